"""What was done, in words: the line below every table and the paragraph for a paper."""

from collections.abc import Sequence

from reports.ablation import Ablation
from reports.effects import Effect
from reports.words import plural


def data_words(ablation: Ablation) -> str:
    """Say which images, how many, and how to recognise them."""
    data = ablation.study.data
    source = str(data.get("source", "")).removeprefix("folder:").rstrip("/").rpartition("/")[2]
    counts = [f"{data.get('n_train', 0)} training", f"{data.get('n_val', 0)} validation"]
    if data.get("n_test"):
        counts.append(f"{data['n_test']} test")
    classes = plural(len(data.get("classes", [])), "class").replace("classs", "classes")
    mark = str(data.get("fingerprint", ""))[:8]
    return f"{source}: {', '.join(counts)} images, {classes}, fingerprint {mark}"


def seeds_words(ablation: Ablation) -> str:
    """Tell the replicates' seeds and what they draw."""
    first, n = int(ablation.spec["first_seed"]), ablation.replicates
    if not n:
        return "no replicate yet"
    seeds = f"seed {first}" if n == 1 else f"seeds {first} to {first + n - 1}"
    drawn = "head initialisation, order and augmentation"
    if ablation.is_resplit:
        return f"{plural(n, 'replicate')} ({seeds}: {drawn}, and a new validation split each)"
    return f"{plural(n, 'replicate')} ({seeds}: {drawn}; the splits stay)"


def test_split_words(ablation: Ablation) -> str:
    """Tell whether the test split was read."""
    if not ablation.study.data.get("n_test"):
        return "There is no test split."
    if not ablation.n_tested:
        return "The test split was not used."
    return f"The test split was read for {plural(ablation.n_tested, 'run')}."


def correction_words(ablation: Ablation, n_tests: int) -> str:
    """Tell the test, the correction and, of an adaptive ablation, how looking was paid for."""
    rules = ablation.rules
    text = f"two-sided paired t-test, Holm's correction over {plural(n_tests, 'level')}"
    if not ablation.is_adaptive:
        return text
    looks = ", ".join(str(n) for n in rules.looks)
    return (
        f"{text}; adaptive, looks at {looks} replicates, the error spent by the power family "
        "(squared; Kim & DeMets 1987) and Bonferroni over looks"
    )


def version_words(ablation: Ablation) -> str:
    """Tell the date and the versions that decide numbers."""
    versions = ablation.study.versions
    known = [f"{name} {versions[name]}" for name in ("frostline", "torch") if name in versions]
    return f"{ablation.design.updated_at:%Y-%m-%d}, {', '.join(known)}"


def footer(ablation: Ablation, what: str, *, split: str = "validation") -> str:
    """Write the line below a table or figure: enough to be pasted into a paper.

    Args:
        ablation: The design and its runs.
        what: How this table's figures are to be read.
        split: Whose accuracy it shows.
    """
    missing = f" {plural(ablation.n_missing, 'run')} still missing." if ablation.n_missing else ""
    chosen = " (best epoch of each run)" if split == "validation" else ""
    return (
        f"{what} Accuracy: {split} split{chosen}. Baseline: {ablation.spec['origin']}. "
        f"{_sentence(seeds_words(ablation))}.{missing} Data: {data_words(ablation)}. "
        f"{test_split_words(ablation)} {version_words(ablation)}."
    )


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def methods_paragraph(ablation: Ablation, effects: Sequence[Effect]) -> str:
    """Write the paragraph that a paper's methods section needs."""
    rules, spec = ablation.rules, ablation.spec
    train = ablation.study.config["train"]
    factors = ", ".join(str(factor["name"]) for factor in spec["factors"])
    n_tests = len([effect for effect in effects if effect.n >= 2])
    parts = [
        f"We ablated {spec['origin']} ({train['backbone']}, weights {train['weights']}, "
        f"{train['epochs']} epochs, batch size {train['batch_size']}) on {data_words(ablation)}. "
        f"Design: {spec['construction']}; factors: {factors}. "
        f"Every setting was trained with {seeds_words(ablation)}, with the same seeds for all "
        "settings, so that differences are paired."
    ]
    if effects:  # of levels against the baseline
        parts.append(
            "Effects are mean paired differences in validation accuracy to the baseline with 95 % "
            f"Student t intervals; p values are of the {correction_words(ablation, n_tests)} "
            f"(family-wise alpha {rules.alpha:g}). Levels count as equal where two one-sided "
            f"t-tests, corrected alike, place the difference within ±{100 * rules.margin:g} "
            "accuracy points."
        )
    elif ablation.kind == "path":
        parts.append(
            "Each step's gain is the mean paired difference to the step before, with an interval "
            "and p value corrected (Bonferroni) for the choice among the step's candidates."
        )
    else:
        parts.append(
            "Effects are estimated within each replicate by least squares on the coded design; "
            "intervals and t-tests are over replicates, with Holm's correction over the effects."
        )
    failed = sum(runs.arm.n_failed for runs in ablation.runs)
    if failed:
        parts.append(f"{plural(failed, 'run')} failed and {'is' if failed == 1 else 'are'} shown.")
    variance = (
        "initialisation, order, augmentation and the choice of the validation split"
        if ablation.is_resplit
        else "initialisation, order and augmentation, not the choice of images"
    )
    speak = f"Intervals speak of the variance due to {variance}. "
    if ablation.replicates < 2:
        speak = "With one replicate nothing is said of other seeds. "
    parts.append(
        f"{speak}Each run's accuracy is that of its best epoch on the validation split, by "
        f"{ablation.chosen_by}, and therefore optimistic, the more so the more epochs a setting "
        f"has. {test_split_words(ablation)} Run on {version_words(ablation)}."
    )
    return " ".join(parts)


def effects_note(ablation: Ablation, n_tests: int) -> str:
    """Say how the columns of the table of effects are to be read."""
    rules = ablation.rules
    finer = rules.resolution > rules.margin
    step = f"; one validation image is {100 * rules.resolution:.2g} points" if finer else ""
    return footer(
        ablation,
        "Accuracy: mean ± half-width of the 95 % t interval over seeds. Difference: level minus "
        "baseline, paired by seed, with its own 95 % t interval. In brackets: the baseline's own "
        f"level. p, Holm: {correction_words(ablation, n_tests)}. No difference: two one-sided "
        f"t-tests place it within ±{100 * rules.margin:g} points, corrected alike{step}. "
        f"Replicates that would settle it: for 80 % power.{_compounds(ablation)}",
    )


def _compounds(ablation: Ablation) -> str:
    """Spell out the levels that set several keys."""
    parts = []
    for factor in ablation.spec["factors"]:
        for level in factor["levels"]:
            if list(level["overrides"]) != [factor["name"]]:
                keys = ", ".join(f"{key} {value}" for key, value in level["overrides"].items())
                parts.append(f"{factor['name']} = {level['label']}: {keys}")
    return f" Levels of several settings: {'; '.join(parts)}." if parts else ""
