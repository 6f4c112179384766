"""What an ablation did, in words: below its tables, and as a paragraph for a paper."""

from pathlib import PurePath

from reports.ablation import Ablation, Split
from reports.intervals import selection_bias
from reports.words import plural

_SPLITS: dict[Split, str] = {"val": "validation", "test": "test"}


def dataset_name(ablation: Ablation) -> str:
    """Name the images by the last part of their folder, or by their source."""
    source = str(ablation.study.data["source"]).removeprefix("folder:")
    return PurePath(source).name or source


def data_words(ablation: Ablation) -> str:
    """Say which images, how many, and how to recognise them."""
    data = ablation.study.data
    counts = f"{data['n_train']} training, {data['n_val']} validation"
    if data["n_test"]:
        counts += f", {data['n_test']} test"
    classes = plural(len(data["classes"]), "class", "classes")
    counts = f"{dataset_name(ablation)}: {counts} images, {classes}"
    return f"{counts}, fingerprint {data['fingerprint'][:8]}"


def seeds_words(ablation: Ablation) -> str:
    """Name the seeds of the replicates that are done."""
    first, n = ablation.first_seed, ablation.replicates
    return f"seeds {first} to {first + n - 1}" if n > 1 else f"seed {first}"


def scope_words(ablation: Ablation, split: Split = "val") -> str:
    """Say over what a design's intervals and verdicts generalise, as the end of a sentence."""
    n = ablation.replicates
    if split == "val" and ablation.n_folds > 1:
        return (
            f"other seeds, other training images and other validation images of the same kind "
            f"({plural(n, 'replicate')}, each one fold of a {ablation.n_folds}-fold "
            f"cross-validation, {ablation.n_images} images in all; corrected resampled t-test)."
        )
    n_images = ablation.study.data[f"n_{split}"]
    if ablation.n_folds > 1:  # of the test split
        return (
            f"other seeds and other test images of the same kind ({plural(n, 'replicate')}, whose "
            f"training images overlap, crossed with {n_images} images), not other datasets."
        )
    if all(runs.is_solved for runs in ablation.runs):
        return (
            f"other {_SPLITS[split]} images of the same kind ({n_images} were used). Solved heads "
            "have no seed; other training images may give other differences."
        )
    return (
        f"other seeds and other {_SPLITS[split]} images of the same kind ({plural(n, 'seed')} "
        f"crossed with {n_images} images), not other training images or datasets."
    )


def bias_words(ablation: Ablation) -> str:
    """Say what bias is left where a search chose the baseline."""
    chosen = ablation.spec["chosen"]
    if not chosen:
        return ""
    is_apart = ablation.study.config["data"].get("judged_by") == "ablation"
    if is_apart and ablation.n_folds == 1:
        return "The search that found the baseline saw none of these images."
    bias = selection_bias(chosen["value"], int(chosen["n_val"]), int(chosen["epochs"]))
    scale = 100 * min(1.0, chosen["n_val"] / ablation.n_images_planned)
    part = "some" if ablation.n_folds > 1 else "all"
    remedy = "data.ablation_fraction keeps images apart against that."
    if is_apart:
        remedy = "ablation.folds = 1 judges by images that were kept apart."
    return (
        f"A search chose the baseline by {part} of these images, so that levels look worse than "
        f"they are: by about {scale * chosen['bias']:.1f} points (simulated from its trials' "
        f"predictions, as if all were equally good), by {scale * bias:.1f} at most (the best of "
        f"{int(chosen['epochs'])} epochs on {int(chosen['n_val'])} images); "
        f"{remedy}"
    )


def analyses_words(ablation: Ablation) -> str:
    """Say how many analyses share the error, and what that leaves for this one."""
    alpha, n = ablation.alpha, ablation.n_analyses
    own = [e for split in _SPLITS for e in ablation.spec["analyses"] if e["split"] == split]
    shares = ", ".join(f"{alpha / 2 ** e['order']:.2g} ({_SPLITS[e['split']]})" for e in own)
    text = (
        f"{plural(n, 'analysis', 'analyses')} of this ablation so far (all "
        f"designs, the test split and later additions); the k-th tests at {alpha:g} / 2^k, so "
        f"that together they err with at most {100 * alpha:g} %. Of this design: {shares}"
    )
    if ablation.is_adaptive:
        looks = ", ".join(str(n) for n in ablation.spec["looks"])
        text += f", shared by interim analyses at {looks} replicates"
    return f"{text}. Corrected p values include that: compare them with {alpha:g}."


def methods_paragraph(ablation: Ablation) -> str:
    """Write the paragraph that a paper's methods section needs."""
    spec, train, n = ablation.spec, ablation.study.config["train"], ablation.replicates
    is_once = ablation.n_folds == 1 and any(runs.is_solved for runs in ablation.runs)
    once = " (solved heads once, for they have no seed)" if is_once and n > 1 else ""
    seeds = f" ({seeds_words(ablation)})" if n else ""
    most = "at most " if ablation.is_adaptive or ablation.n_missing else ""
    parts = [
        f"We ablated {spec['origin']} ({train['backbone']}, weights {train['weights']}, "
        f"{train['epochs']} epochs, batch size {train['batch_size']}) on {data_words(ablation)}. "
        f"Design: {spec['construction']}; factors: {', '.join(ablation.own_levels)}. Every "
        f"setting was trained with {most}{plural(n, 'replicate')}{seeds}, the same for all "
        f"settings{once}, so that differences are paired."
    ]
    if ablation.n_folds > 1:
        parts.append(
            f"Replicates validate on the folds of a {ablation.n_folds}-fold cross-validation of "
            f"all images but the test split, on {ablation.n_images} in all. Differences are means "
            "over replicates with intervals and p values of the corrected resampled t-test "
            "(Nadeau and Bengio 2003), the variance of a fold being that of its images, estimated "
            "from all of them, and what folds scatter beyond, with Satterthwaite's degrees of "
            "freedom."
        )
    else:
        parts.append(
            f"All replicates validate on the same {ablation.n_images} images. Differences in "
            "accuracy are means over seeds and images; intervals and p values take both for "
            "crossed random samples (analysis of variance with Satterthwaite's degrees of "
            "freedom); of solved heads, which have no seed, images alone."
        )
    if ablation.kind == "path":
        parts.append(
            "p values and intervals of steps are corrected (Bonferroni) for the candidates of all "
            "steps."
        )
    else:
        what = "effects and interactions" if ablation.kind == "factorial" else "levels"
        parts.append(f"p values are corrected by Holm's method over {spec['n_tests']} {what}.")
    parts.append(
        f"Settings count as equivalent where two one-sided tests, corrected alike, place the "
        f"difference within ±{100 * ablation.margin:g} accuracy points."
    )
    if ablation.n_folds == 1:
        parts.append(
            "They count as different on these images only, where the t-test over seeds finds a "
            "difference and that over seeds and images does not."
        )
    parts += [analyses_words(ablation), bias_words(ablation)]
    failed = sum(runs.n_failed for runs in ablation.runs)
    if failed:
        parts.append(f"{plural(failed, 'run')} failed and {'is' if failed == 1 else 'are'} shown.")
    tested = f"The test split was read for {plural(ablation.n_tested, 'run')}."
    versions = ablation.study.versions
    known = [f"{name} {versions[name]}" for name in ("frostline", "torch") if name in versions]
    parts.append(
        f"Each run's accuracy is that of its best epoch on its validation images, by "
        f"{ablation.chosen_by}, and therefore optimistic, the more so the more epochs a setting "
        f"has. {tested if ablation.n_tested else 'The test split was not read.'} Run on "
        f"{ablation.design.updated_at:%Y-%m-%d}, {', '.join(known)}."
    )
    return " ".join(part for part in parts if part)
