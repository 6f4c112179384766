"""What an ablation's runs show: differences of recipes, tested over seeds and images, judged."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from reports.ablation import Ablation, Runs, Split
from reports.intervals import Interval
from reports.statistics import (
    ENOUGH_FOLDS,
    Array,
    Inference,
    Part,
    crossed,
    detectable,
    holm,
    images_needed,
    replicates_needed,
    resampled,
    seeds_only_p,
)
from reports.words import plural

Verdict = Literal[
    "improves",
    "degrades",
    "improves on these images",
    "degrades on these images",
    "equivalent",
    "identical",
    "inconclusive",
    "fails",
    "unfinished",
]
# Accuracy below the median of its setting at which a run counts as fallen, and by how many times
# the scatter of the others. Assumptions; in simulations they flag 9 of 10 such settings.
_FALL = 0.05
_FALL_SCATTER = 2 * 1.4826  # median absolute deviations, as standard deviations
_FALL_IMAGES = 2.5  # standard errors of a fold's images


@dataclass(frozen=True, slots=True)
class Contrast:
    """A weighted sum of cells, whose expectation is 0 where what it stands for does nothing.

    Attributes:
        factor: What is varied: a factor, or `a × b` for an interaction.
        level: What it is set to, in words.
        weights: Cell's position -> weight.
        n_tests: By how many its p value is multiplied, beside Holm's correction (a path's steps).
    """

    factor: str
    level: str
    weights: Mapping[int, float]
    n_tests: int = 1

    @property
    def label(self) -> str:
        """Name it in figures and sentences."""
        return f"{self.factor} = {self.level}" if self.level else self.factor

    @property
    def cell(self) -> int | None:
        """Return the cell that it compares with one other cell; None where it has more."""
        return next((k for k, weight in self.weights.items() if weight == 1), None)


@dataclass(frozen=True, slots=True)
class Effect:
    """A contrast, estimated and judged; differences are fractions.

    Attributes:
        n: Replicates that are complete in all of its cells.
        difference: Mean with its interval, which is not corrected for other contrasts.
        confidence: Of the interval: 0.95, or more after several analyses and of a path's steps.
        sd: Standard deviation of the replicates' differences.
        median: Their median.
        p: Two-sided, over seeds and images, not corrected.
        p_family: The same after all corrections: Holm's and that for repeated analyses.
        p_equivalence: Two one-sided tests within the margin, corrected alike.
        p_seeds: Over seeds alone, the images taken as they are, corrected alike.
        n_needed: About how many replicates would settle it; None unless inconclusive, or where
            none up to 1,000 would.
        images_needed: About how many images would, where no number of replicates does.
        n_failed: Runs that failed in the cell that it adds.
        n_run: Runs of that cell that came to an end.
    """

    contrast: Contrast
    n: int
    difference: Interval
    confidence: float
    sd: float
    median: float
    p: float
    p_family: float
    p_equivalence: float
    p_seeds: float
    verdict: Verdict
    n_needed: int | None = None
    images_needed: int | None = None
    n_failed: int = 0
    n_run: int = 0


# What is compared


def contrasts_of(ablation: Ablation) -> list[Contrast]:
    """List what a design compares: levels with the baseline, factorial effects, or steps."""
    if ablation.kind == "factorial":
        return list(_factorial(ablation))
    if ablation.kind == "path":
        return list(_steps(ablation))
    base = ablation.position({})
    return [
        Contrast(" + ".join(runs.levels), " + ".join(runs.levels.values()), {k: 1.0, base: -1.0})
        for k, runs in enumerate(ablation.runs)
        if runs.levels
    ]


def _factorial(ablation: Ablation) -> Iterator[Contrast]:
    """Give main effects, all else averaged, and half of each interaction of two levels."""
    coded = np.array(ablation.spec["coded"])  # (cells, factors), 0 is the baseline's level
    levels = [
        (k, number, str(factor["name"]), str(level["label"]))
        for k, factor in enumerate(ablation.spec["factors"])
        for number, level in enumerate(factor["levels"], start=1)
    ]
    for k, number, name, label in levels:
        weights = _mean_of(coded[:, k] == number) - _mean_of(coded[:, k] == 0)
        yield Contrast(name, label, _sparse(weights))
    for (a, i, name, label), (b, j, other, level) in itertools.combinations(levels, 2):
        if a == b:
            continue
        first = [coded[:, a] == i, coded[:, a] == 0]
        second = [coded[:, b] == j, coded[:, b] == 0]
        both = _mean_of(first[0] & second[0]) + _mean_of(first[1] & second[1])
        one = _mean_of(first[0] & second[1]) + _mean_of(first[1] & second[0])
        yield Contrast(f"{name} × {other}", f"{label} × {level}", _sparse((both - one) / 2))


def _mean_of(is_in: "np.ndarray[tuple[int], np.dtype[np.bool_]]") -> Array:
    share: Array = is_in / is_in.sum()
    return share


def _sparse(weights: Array) -> dict[int, float]:
    return {int(k): float(weights[k]) for k in np.flatnonzero(weights)}


def _steps(ablation: Ablation) -> Iterator[Contrast]:
    """Give each step of a path against the one before it, and the end against the start.

    A step is the best of its candidates, so that each p value is multiplied by the candidates of
    all steps together.
    """
    cells = ablation.path_cells()
    n_factors = len(ablation.spec["factors"])
    n_candidates = math.comb(n_factors + 1, 2)
    factors = {factor["name"]: factor for factor in ablation.spec["factors"]}
    pairs = itertools.pairwise(cells)
    for (before, after), name in zip(pairs, ablation.spec["steps"], strict=True):
        factor = factors[name]
        change = f"{factor['levels'][0]['label']} → {factor['baseline']}"
        yield Contrast(str(name), change, {after: 1.0, before: -1.0}, n_candidates)
    if len(cells) > 2:
        weights = {cells[-1]: 1.0, cells[0]: -1.0}
        yield Contrast("all steps", "start → end", weights, n_candidates)


# How it is judged


def judge(ablation: Ablation, split: Split = "val") -> list[Effect]:
    """Estimate every contrast of a design on a split, and judge the family of them.

    Analyses share one error: the k-th of an ablation, over all its designs and the test split,
    tests at alpha / 2^k, and the planned interim analyses of one share that among them, so that by
    Bonferroni all together hold alpha whenever the replicates are stopped. A difference is shown
    as soon as there are runs, a verdict only for an analysis that was recorded before its runs.

    Returns:
        One effect per contrast, in the order of `contrasts_of`; on the test split without those
        that were not tested.
    """
    found = [_estimated(ablation, contrast, split) for contrast in contrasts_of(ablation)]
    family, equal, seeds = (
        _corrected([getattr(effect, key) for effect, _ in found], ablation, split)
        for key in ("p_family", "p_equivalence", "p_seeds")
    )
    effects = [
        _judged(ablation, replace(effect, p_family=p, p_equivalence=q, p_seeds=s), inference)
        for (effect, inference), p, q, s in zip(found, family, equal, seeds, strict=True)
    ]
    return [effect for effect in effects if split == "val" or effect.n]


def _corrected(values: Sequence[float], ablation: Ablation, split: Split) -> list[float]:
    """Correct p values by Holm's method; comparisons whose runs are still missing count, too."""
    if ablation.kind == "path":  # multiplied by all candidates instead
        return list(values)
    open_p = math.nan if split == "test" else 1.0  # what was not tested there never will be
    family = holm([open_p if math.isnan(p) else p for p in values])
    return [p if math.isnan(p) else q for p, q in zip(values, family, strict=True)]


def _estimated(ablation: Ablation, contrast: Contrast, split: Split) -> tuple[Effect, Inference]:
    """Estimate a contrast: of the last analysis, or of all runs where there was none.

    Its p values are not corrected for other contrasts yet, and its verdict is `inconclusive`
    where it depends on them.
    """
    differences = _differences(ablation, contrast, split)
    n_run = min(ablation.runs[k].n_run(split) for k in contrast.weights)
    looks = [
        look
        for look in ablation.looks(split)
        if look.n <= n_run and (look.cells is None or look.cells >= contrast.weights.keys())
    ]
    n = max((look.n for look in looks), default=len(differences))
    rows = [row for row in differences[:n] if row is not None]
    inference = _infer(ablation, contrast, rows, split)
    means = np.array([row.mean() for row in rows])
    # After several analyses, an interval that holds over all of them.
    share = looks[-1].share if len(looks) > 1 else 1.0
    confidence = 1 - 0.05 * share / contrast.n_tests
    added = [ablation.runs[k] for k, weight in contrast.weights.items() if weight > 0]
    n_failed = sum(runs.n_failed for runs in added) if split == "val" else 0
    verdict: Verdict = "inconclusive"
    if n_failed and contrast.cell is not None:
        verdict = "fails"
    elif not looks or not rows:
        verdict = "unfinished"
    elif not any(row.any() for row in rows):
        verdict = "identical"
    # The smallest p values of all analyses, each over its share of the error; NaN without any.
    found = [np.full(3, math.nan)]
    for look in looks:
        seen = [row for row in differences[: look.n] if row is not None]
        p = _p_values(ablation, contrast, seen, split)
        found.append(np.minimum(1.0, p * contrast.n_tests / look.share))
    p_family, p_equivalence, p_seeds = map(float, np.fmin.reduce(found))
    effect = Effect(
        contrast=contrast,
        n=len(rows),
        difference=inference.interval(confidence),
        confidence=confidence,
        sd=float(means.std(ddof=1)) if len(means) > 1 else math.nan,
        median=float(np.median(means)) if len(means) else math.nan,
        p=inference.p,
        p_family=p_family,
        p_equivalence=p_equivalence,
        p_seeds=p_seeds,
        verdict=verdict,
        n_failed=n_failed,
        n_run=sum(runs.n_run() for runs in added),
    )
    return effect, inference


def _p_values(
    ablation: Ablation, contrast: Contrast, rows: Sequence[Array], split: Split
) -> Array:
    """Return the p values of a difference, of equivalence, and over seeds alone, (3,)."""
    inference = _infer(ablation, contrast, rows, split)
    equal = seeds = math.nan
    if any(row.any() for row in rows):  # a few equal runs do not show how much others scatter
        equal = inference.equivalence_p(ablation.margin)
    if rows and _has_seed(ablation, contrast) and (split == "test" or ablation.n_folds == 1):
        seeds = seeds_only_p(np.array([row.mean() for row in rows]), 1 / len(rows[0]))
    return np.array([inference.p, equal, seeds])


def _differences(ablation: Ablation, contrast: Contrast, split: Split) -> list[Array | None]:
    """Return a contrast of every replicate, image by image; None where a cell has no run."""
    cells = (ablation.runs[k].correct[split] for k in contrast.weights)
    weights = contrast.weights.values()
    found: list[Array | None] = []
    for rows in itertools.zip_longest(*cells):
        known = [w * row for w, row in zip(weights, rows, strict=True) if row is not None]
        found.append(np.sum(known, axis=0) if len(known) == len(rows) else None)
    return found


def _infer(
    ablation: Ablation, contrast: Contrast, rows: Sequence[Array], split: Split
) -> Inference:
    if not rows:
        return Inference(0, 0, math.nan)
    if split == "val" and ablation.n_folds > 1:
        return resampled(rows, ablation.n_folds)
    return crossed(np.stack(rows), has_seed=_has_seed(ablation, contrast))


def _has_seed(ablation: Ablation, contrast: Contrast) -> bool:
    """Return whether replicates differ; solved heads of the same training images do not."""
    return ablation.n_folds > 1 or not all(ablation.runs[k].is_solved for k in contrast.weights)


def _judged(ablation: Ablation, effect: Effect, inference: Inference) -> Effect:
    """Give an effect its verdict and, where that is open, what might settle it."""
    verdict = _verdict(effect, ablation.alpha)
    if verdict != "inconclusive" or not inference.parts:
        return replace(effect, verdict=verdict)
    level = ablation.alpha * _next_share(ablation) / (effect.contrast.n_tests * ablation.n_tests)
    needed, images = replicates_needed(inference, level, ablation.margin), None
    if needed is None and inference.estimate:
        images = images_needed(inference, level)
    return replace(effect, n_needed=needed, images_needed=images)


def _next_share(ablation: Ablation) -> float:
    """Return the share of the error that more replicates would be tested with."""
    if ablation.is_adaptive:
        return ablation.looks("val")[-1].share
    return float(0.5 ** (ablation.n_analyses + 1))


def _verdict(effect: Effect, alpha: float) -> Verdict:
    if effect.verdict != "inconclusive":  # whatever its p values
        return effect.verdict
    is_gain = effect.difference.estimate > 0
    if effect.p_family <= alpha:
        return "improves" if is_gain else "degrades"
    if effect.p_equivalence <= alpha:
        return "equivalent"
    if effect.p_seeds <= alpha:
        return "improves on these images" if is_gain else "degrades on these images"
    return "inconclusive"


def open_cells(ablation: Ablation) -> set[int]:
    """Return the cells of an adaptive ablation that more replicates could still decide."""
    found = set()
    for effect in judge(ablation):
        is_open = effect.verdict == "inconclusive" and effect.n_needed is not None
        if is_open or effect.verdict in ("identical", "unfinished"):
            found |= {k for k, weight in effect.contrast.weights.items() if weight > 0}
    return found


def fallen(runs: Runs, n_folds: int = 1) -> list[int]:
    """Return the replicates whose accuracy fell far below those of the same setting.

    Folds have different images, whose difference alone may be this large where they are few.
    """
    if len(runs.done) < 3:
        return []
    middle = float(np.median(runs.done))
    scatter = _FALL_SCATTER * float(np.median(np.abs(runs.done - middle)))
    sizes = [len(correct) for correct in runs.correct["val"] if correct is not None]
    if n_folds > 1 and sizes:
        scatter = max(scatter, _FALL_IMAGES * math.sqrt(middle * (1 - middle) / min(sizes)))
    return [int(r) for r in np.flatnonzero(runs.accuracies["val"] < middle - max(_FALL, scatter))]


# Before a run

# Two settings disagree on this share of images, and their difference scatters by so much from seed
# to seed. Assumptions: between pretrained networks, 5 to 20 % and 0.5 to 3 points were seen.
_DISAGREEMENT = 0.10
_SEED_SCATTER = 0.01
_LARGE = 0.05


def foresee(
    n: int, n_tests: int, n_images: int, n_folds: int, alpha: float, order: int = 1
) -> str:
    """Say, before a run, what it could decide.

    Args:
        n: Replicates (the most of an adaptive ablation).
        n_tests: Comparisons that will be corrected for each other.
        n_images: Images by which runs are judged, of all folds.
        n_folds: Folds; 1 where all replicates share one split.
        alpha: Family-wise error of the ablation.
        order: Which analysis of the ablation it will be, from 1.

    Returns:
        A sentence; one that begins with `warning:` names a run that could decide little.
    """
    level = alpha / 2**order / n_tests
    if n < 2:
        return (
            "warning: one replicate cannot be tested (but for solved heads, which have no seed): "
            "differences are shown without interval or verdict. Give --replicates 5 or more."
        )
    if n_folds > 1:
        overlap = 1 / (n_folds - 1)
        images, seeds = _DISAGREEMENT * n_folds / n_images, _SEED_SCATTER**2
        df = n_images if n >= ENOUGH_FOLDS else None
        parts = (Part(images, images * overlap, df), Part(seeds, seeds * overlap))
    else:
        parts = (Part(0.0, _DISAGREEMENT / n_images, n_images), Part(_SEED_SCATTER**2, 0.0))
    size = detectable(Inference(n, n_images, 0.0, parts), level)
    text = (
        f"{n} replicates on {n_images} images in all find differences of about "
        f"{100 * size:.1f} points or more (80 % power, {plural(n_tests, 'comparison')}, if two "
        f"settings disagree on {100 * _DISAGREEMENT:.0f} % of images)."
    )
    if size > 1:
        return (
            f"warning: {n} replicates on {n_images} images cannot show a difference of any size."
        )
    if size > _LARGE:
        return f"warning: {text} More images, more replicates or fewer levels find smaller ones."
    return text
