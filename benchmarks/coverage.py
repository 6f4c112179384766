"""Error rates, coverage and power of what an ablation says, on simulated and on real predictions.

Every study is judged by the code that reports use (`reports.effects.judge`). Simulated studies
have latent image difficulty, so that accuracies tie as those of 80 images do; those marked `real`
resample the predictions of real runs (`benchmarks/tables/predictions.npz`, made by `--record`) and
swap the labels of the recipes image by image, so that nothing but chance is left and the
simulation does not share the rule's assumptions. `7fb2af4` judges the same accuracies by the code
of that commit.

    python benchmarks/coverage.py --studies 2000
    python benchmarks/coverage.py --record --data DATA/hotdog --work /tmp/predictions
"""

import argparse
import functools
import io
import json
import math
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reports.ablation import Ablation, Runs
from reports.effects import Effect, fallen, judge
from reports.intervals import selection_bias, simulated_bias

Array = NDArray[np.float64]
TABLE = Path(__file__).parent / "tables" / "predictions.npz"
BEFORE = "7fb2af4"
N_IMAGES = 80
ALPHA, MARGIN = 0.05, 0.01

# What 7fb2af4 says of accuracies (studies, arms, replicates): whether any level helps or hurts,
# whether the first level's interval holds its true effect, and whether it counts as equal.
_BEFORE = """
import json, sys
import numpy as np
from reports import effects as old
from reports.effects import Arm, Rules, estimate_effects
# Neither the bootstrap, the sign flips nor the plan for more runs decided anything; all are slow.
old.bca_interval = old.replicates_needed = lambda *_: None
old.sign_flip = lambda *_: float("nan")
rng = np.random.default_rng(0)
scores, truth = np.load(sys.argv[1]), float(sys.argv[2])
rules = Rules(resolution=1 / float(sys.argv[3]))
found = {"calls": 0, "covers": 0, "equal": 0}
for study in scores:
    arms = [Arm(str(k), "f", str(k), row, (None,) * len(row)) for k, row in enumerate(study)]
    effects = estimate_effects(arms[0], arms[1:], rules, rng)
    found["calls"] += any(e.verdict in ("helps", "hurts") for e in effects)
    found["covers"] += effects[0].difference.low <= truth <= effects[0].difference.high
    found["equal"] += effects[0].verdict == "no difference"
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Row:
    """A row of the table: shares of studies, each with its Monte-Carlo standard error.

    Attributes:
        what: What was simulated.
        n: Studies.
        calls: In which any comparison was called an improvement or a degradation.
        on_these: In which any was, on these images only.
        covers: Of the intervals, those that held the truth; NaN where it is not asked.
        before: Calls of 7fb2af4; NaN where it cannot judge such a study.
        more: What else was counted.
    """

    what: str
    n: int
    calls: float
    on_these: float = math.nan
    covers: float = math.nan
    before: float = math.nan
    more: str = ""

    def __str__(self) -> str:
        cells = [f"{self.what:58}", f"{self.n:6d}"]
        for share in (self.calls, self.before, self.on_these, self.covers):
            error = math.sqrt(max(share * (1 - share), 0) / self.n) if share == share else 0
            cells.append(
                f"{100 * share:5.1f} ± {100 * error:3.1f}" if share == share else " " * 11
            )
        return "  ".join([*cells, self.more])


# Studies


def difficulty(rng: np.random.Generator, n: int = N_IMAGES) -> Array:
    """Draw how easy images are, (N,), so that about four of five are classified correctly."""
    return rng.normal(1.4, 1.5, n)


def predictions(
    rng: np.random.Generator,
    easy: Array,
    n_arms: int,
    n_seeds: int,
    *,
    recipe: float = 1.0,
    seed: float = 0.05,
    run: float = 1.0,
    shared: float = 0.0,
    tails: bool = False,
    shift: Sequence[float] = (),
) -> Array:
    """Draw what is classified correctly, (arms, R, N), 0 or 1.

    Args:
        rng: Source of randomness.
        easy: Of the images.
        n_arms: Recipes.
        n_seeds: R.
        recipe: Scatter of recipe × image: recipes that are equal over images differ on each.
        seed: Scatter of a run over all images.
        run: Scatter of a run on an image.
        shared: Scatter of a seed that all recipes share.
        tails: Whether runs scatter with heavy tails.
        shift: Of each recipe on the latent scale; all 0 where it is empty.
    """
    draw = (lambda *shape: rng.standard_t(3, shape)) if tails else rng.standard_normal
    of_run = draw(n_arms, n_seeds, 1) if tails else rng.standard_normal((n_arms, n_seeds, 1))
    latent = (
        easy
        + recipe * rng.standard_normal((n_arms, 1, len(easy)))
        + seed * of_run
        + shared * rng.standard_normal((1, n_seeds, 1))
        + run * rng.standard_normal((n_arms, n_seeds, len(easy)))
    )
    if len(shift):
        latent += np.asarray(shift)[:, None, None]
    return (latent > 0).astype(np.float64)


def study_of(
    correct: Sequence[Sequence[Array]],
    analyses: Sequence[tuple[str, int, Sequence[int]]] = (),
    *,
    kind: str = "ofat",
    factors: Sequence[int] = (),
    coded: Sequence[Sequence[int]] = (),
    n_folds: int = 1,
    is_solved: bool = False,
    test: Sequence[Sequence[Array]] | None = None,
) -> Ablation:
    """Make an ablation of predictions: of each cell its replicates, each (N,); a path in order.

    Args:
        correct: By cell and replicate, the baseline's cell first.
        analyses: Split, order, replicates at interim analyses; one of all replicates if empty.
        kind: Of the design.
        factors: Levels of each factor beside the baseline's; one factor of all cells if empty.
        coded: Of a factorial, the level of each factor by cell.
        n_folds: Folds that replicates go through.
        is_solved: Whether replicates cannot differ.
        test: What is right on the test split, likewise.
    """
    n = max(map(len, correct))
    analyses = analyses or [("val", 1, [n])]
    counts = list(factors) or [len(correct) - 1]
    listed = [
        {"name": f"f{k}", "baseline": "0", "levels": [{"label": str(j + 1)} for j in range(count)]}
        for k, count in enumerate(counts)
    ]
    rows = coded or [[k] for k in range(len(correct))]
    runs = []
    for k, (row, cell) in enumerate(zip(rows, correct, strict=True)):
        levels = {f"f{f}": str(level) for f, level in enumerate(row) if level}
        values = np.full(n, math.nan)
        values[: len(cell)] = [each.mean() for each in cell]
        tested = np.full(n, math.nan)
        if test is not None:
            tested[: len(test[k])] = [each.mean() for each in test[k]]
        runs.append(
            Runs(
                label=", ".join(f"{a} = {b}" for a, b in levels.items()) or "baseline",
                levels=levels,
                accuracies={"val": values, "test": tested},
                failures=(None,) * n,
                numbers=(None,) * n,
                correct={"val": tuple(cell), "test": tuple(test[k]) if test is not None else ()},
                seconds=1.0,
                parameters=1,
                is_solved=is_solved,
            )
        )
    counted = sum(counts) + sum(a * b for i, a in enumerate(counts) for b in counts[i + 1 :])
    spec = {
        "factors": listed,
        "coded": [list(row) for row in rows] if kind == "factorial" else [],
        "steps": [f["name"] for f in listed] if kind == "path" else [],
        "n_tests": counted if kind == "factorial" else sum(counts),
        "n_folds": n_folds,
        "settings": {"alpha": ALPHA, "margin": 100 * MARGIN},
        "looks": list(analyses[-1][2]),
        "analyses": [{"split": s, "order": o, "replicates": list(r)} for s, o, r in analyses],
    }
    study: Any = _Plain()
    design: Any = _Plain(kind=kind, spec=spec)
    return Ablation(study, design, tuple(runs), len(analyses))


class _Plain:
    """The two rows of the record that an ablation holds, as far as judging needs them."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


def called(effects: Sequence[Effect]) -> bool:
    """Say whether anything is called different."""
    return any(effect.verdict in ("improves", "degrades") for effect in effects)


def on_these_images(effects: Sequence[Effect]) -> bool:
    """Say whether anything is called different on these images, or at all."""
    return any(effect.verdict.startswith(("improves", "degrades")) for effect in effects)


def covered(effects: Sequence[Effect], truth: float = 0.0) -> float:
    """Return the share of intervals that hold the true difference."""
    return float(np.mean([e.difference.low <= truth <= e.difference.high for e in effects]))


class Old:
    """The statistics of an earlier commit, from its own code."""

    def __init__(self, revision: str) -> None:
        self._folder = tempfile.TemporaryDirectory()
        packed = subprocess.run(
            ["git", "archive", revision, "core", "study", "reports"],
            capture_output=True, check=True, cwd=Path(__file__).parent.parent,
        ).stdout  # fmt: skip
        with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
            archive.extractall(self._folder.name, filter="data")

    def judge(
        self, scores: Array, truth: float = 0.0, n_images: int = N_IMAGES
    ) -> dict[str, float]:
        """Judge accuracies, (studies, arms, R); return shares of the studies."""
        with tempfile.NamedTemporaryFile(suffix=".npy") as file:
            np.save(file.name, scores)
            command = [sys.executable, "-c", _BEFORE, file.name, str(truth), str(n_images)]
            done = subprocess.run(
                command, cwd=self._folder.name, env={"PYTHONPATH": self._folder.name},
                capture_output=True, text=True, check=True,
            )  # fmt: skip
        return {key: count / len(scores) for key, count in json.loads(done.stdout).items()}


# Rows


def equal_recipes(
    name: str, draw: Callable[[np.random.Generator], Array], n: int, old: Old, **made: Any
) -> Row:
    """Judge studies of recipes that are equal over images, seeds or both: (arms, R, N) each."""
    rng = np.random.default_rng(len(name) * 7919 + n)
    calls = these = 0
    covers, scores, flagged, fell = 0.0, [], 0, 0
    for _ in range(n):
        correct = draw(rng)
        found = judge(study_of(correct, **made))
        calls += called(found)
        these += on_these_images(found)
        covers += covered(found)
        scores.append(correct.mean(axis=-1))
        if "skewed" in name:
            ablation = study_of(correct, **made)
            has_fallen = any((row < np.median(row) - 0.051).any() for row in scores[-1])
            fell += has_fallen
            flagged += has_fallen and any(fallen(runs) for runs in ablation.runs)
    before = old.judge(np.array(scores), n_images=scores and correct.shape[-1])
    more = (
        f"flagged {100 * flagged / max(fell, 1):.0f} % of {fell} with a fallen seed"
        if fell
        else ""
    )
    return Row(name, n, calls / n, these / n, covers / n, before["calls"], more)


def skewed(rng: np.random.Generator, n_seeds: int) -> Array:
    """Draw a baseline and three levels of which one run in five loses images; means equal."""
    correct = predictions(rng, difficulty(rng), 4, n_seeds, recipe=0.3, run=0.3)
    lost = rng.random((3, n_seeds)) < 0.2
    for arm, seed in zip(*np.nonzero(lost), strict=True):
        right = np.flatnonzero(correct[arm + 1, seed])
        correct[arm + 1, seed, rng.choice(right, min(10, len(right)), replace=False)] = 0
    for seed in range(n_seeds):  # the baseline loses two images in every run instead
        right = np.flatnonzero(correct[0, seed])
        correct[0, seed, rng.choice(right, min(2, len(right)), replace=False)] = 0
    return correct


def null_rows(n: int, old: Old) -> Iterator[Row]:
    """Studies in which nothing has an effect."""

    def drawn(n_arms: int, n_seeds: int, **how: Any) -> Callable[[np.random.Generator], Array]:
        return lambda rng: predictions(rng, difficulty(rng), n_arms, n_seeds, **how)

    for k in (2, 3, 5, 10):
        name = f"recipe × image as large as noise, 3 levels, n = {k}"
        yield equal_recipes(name, drawn(4, k), n, old)
    yield equal_recipes("no scatter of recipe × image, n = 5", drawn(4, 5, recipe=0.0), n, old)
    few = drawn(4, 5, recipe=0.2, run=0.1)
    yield equal_recipes("few disagreements, n = 5", few, n, old)
    tails = drawn(4, 5, tails=True, seed=0.3)
    yield equal_recipes("heavy tails of seeds, n = 5", tails, n, old)
    yield equal_recipes("arms correlated over seeds, n = 5", drawn(4, 5, shared=0.4), n, old)
    yield equal_recipes("large scatter of seeds, n = 5", drawn(4, 5, seed=0.4), n, old)
    yield equal_recipes("unequal variances, n = 5", _unequal, n, old)
    yield equal_recipes("20 levels, n = 5", drawn(21, 5), n // 4, old)
    for k in (5, 10):
        yield equal_recipes(f"skewed seeds, n = {k}", functools.partial(skewed, n_seeds=k), n, old)
    solved = drawn(4, 1, seed=0.0, run=0.0)
    yield equal_recipes("solved heads, 3 levels", solved, n, old, is_solved=True)


def _unequal(rng: np.random.Generator) -> Array:
    """Draw two calm and two restless arms; in all the latent scatter, so the mean, is equal."""
    easy = difficulty(rng)
    calm = predictions(rng, easy, 2, 5, recipe=1.0, seed=0.02, run=0.3)
    return np.concatenate([calm, predictions(rng, easy, 2, 5, recipe=0.2, seed=0.4, run=0.944)])


def top_ups(n: int, n_levels: int) -> Row:
    """Follow the tool's own advice: add the replicates that might settle it, twice at most."""
    rng = np.random.default_rng(23 + n_levels)
    calls = 0
    for _ in range(n):
        correct = predictions(rng, difficulty(rng), n_levels + 1, 40, recipe=0.0, seed=0.15)
        looks = [5]
        for _ in range(3):
            analyses = [("val", k, [m]) for k, m in enumerate(looks, start=1)]
            found = judge(study_of([arm[: looks[-1]] for arm in correct], analyses))
            wanted = [e.n_needed for e in found if e.n_needed]
            if called(found) or not wanted or min(wanted) > 40 or min(wanted) <= looks[-1]:
                break
            looks.append(min(wanted))
        calls += called(found)
    return Row(f"topped up by its own advice, {n_levels} levels", n, calls / n)


def several_designs(n: int) -> Row:
    """Ten designs of one level each in one ablation."""
    rng = np.random.default_rng(29)
    calls = 0
    for _ in range(n):
        correct = predictions(rng, difficulty(rng), 11, 5)
        designs = (
            judge(study_of([correct[0], correct[k]], [("val", k, [5])])) for k in range(1, 11)
        )
        calls += any(called(found) for found in designs)
    return Row("ten designs of one level in one ablation, n = 5", n, calls / n)


def with_test_split(n: int) -> Row:
    """A design and then its test split, either of which may call a difference."""
    rng = np.random.default_rng(31)
    calls = 0
    for _ in range(n):
        both = [predictions(rng, difficulty(rng), 4, 5) for _ in range(2)]
        analyses = [("val", 1, [5]), ("test", 2, [5])]
        study = study_of(both[0], analyses, test=both[1])
        calls += called(judge(study)) or called(judge(study, "test"))
    return Row("a design and then its test split, n = 5", n, calls / n)


def adaptive(n: int) -> Row:
    """Interim analyses at 5, 8, 12 and 20 replicates, planned before."""
    rng = np.random.default_rng(37)
    looks = (5, 8, 12, 20)
    calls, covers = 0, 0.0
    for _ in range(n):
        correct = predictions(rng, difficulty(rng), 4, 20, seed=0.15)
        for k, m in enumerate(looks):
            found = judge(study_of([arm[:m] for arm in correct], [("val", 1, looks)]))
            if called(found) or k == len(looks) - 1:
                break
        calls += called(found)
        covers += covered(found)
    return Row("adaptive, looks at 5, 8, 12, 20", n, calls / n, covers=covers / n)


def factorial(n: int) -> Row:
    """A 3 × 3 factorial in which seeds scatter differently at each level."""
    rng = np.random.default_rng(41)
    coded = [(a, b) for a in range(3) for b in range(3)]
    calls, covers = 0, 0.0
    for _ in range(n):
        easy = difficulty(rng)
        of_level = rng.normal(0, 0.3, (2, 3, 5))  # factor, level, seed
        cells = []
        for a, b in coded:
            shift = of_level[0, a] + of_level[1, b]
            latent = easy + shift[:, None] + rng.normal(0, 1, (5, len(easy)))
            cells.append((latent + rng.normal(0, 0.5, len(easy)) > 0).astype(np.float64))
        found = judge(study_of(cells, kind="factorial", factors=(2, 2), coded=coded))
        calls += called(found)
        covers += covered(found)
    return Row("3 × 3 factorial, seed × level scatter, n = 5", n, calls / n, covers=covers / n)


def path(n: int) -> Row:
    """A path of three factors, none of which does anything."""
    rng = np.random.default_rng(43)
    calls, covers = 0, 0.0
    for _ in range(n):
        cells = {}
        easy = difficulty(rng)
        left, at = [0, 1, 2], (1, 1, 1)
        cells[at] = predictions(rng, easy, 1, 5)[0]
        steps = []
        while left:
            options = {}
            for k in left:
                there = tuple(0 if j == k else level for j, level in enumerate(at))
                cells[there] = options[k] = predictions(rng, easy, 1, 5)[0]
            best = max(options, key=lambda k: options[k].mean())
            left.remove(best)
            steps.append(f"f{best}")
            at = tuple(0 if j == best else level for j, level in enumerate(at))
        rows = sorted(cells)
        study = study_of([cells[row] for row in rows], kind="path", factors=(1, 1, 1), coded=rows)
        study.design.spec["steps"] = steps
        found = judge(study)
        calls += called(found)
        covers += all(e.difference.low <= 0 <= e.difference.high for e in found)
    return Row("path of three factors, n = 5 (all intervals)", n, calls / n, covers=covers / n)


def equivalence(n: int, old: Old) -> Row:
    """A level that is one margin worse, one seed in five of which loses four images."""
    rng = np.random.default_rng(47)
    equal, scores = 0, []
    for _ in range(n):
        correct = predictions(rng, difficulty(rng), 1, 5, run=0.0, seed=0.0)
        correct = np.concatenate([correct, correct])
        for seed in np.flatnonzero(rng.random(5) < 0.2):
            right = np.flatnonzero(correct[1, seed])
            correct[1, seed, rng.choice(right, 4, replace=False)] = 0
        equal += judge(study_of(correct))[0].verdict == "equivalent"
        scores.append(correct.mean(axis=-1))
    before = old.judge(np.array(scores))
    identical = np.mean([(s[0] == s[1]).all() for s in scores])
    more = f"called `equivalent`; {100 * identical:.0f} % are identical in five runs"
    return Row("truth at the margin, rare losses, n = 5", n, equal / n, before=before["equal"],
               more=more)  # fmt: skip


def winners(n: int, n_trials: int, how: str) -> Row:
    """The best of many equal trials as the baseline, and five equal levels.

    Args:
        n: Studies.
        n_trials: Of the search, on 80 of 400 images.
        how: `split`: judged on those 80; `folds`: on all 400; `apart`: on 80 others.
    """
    rng = np.random.default_rng(53 + n_trials)
    calls, hurts, bias = 0, 0, 0.0
    for _ in range(n):
        easy, other = difficulty(rng, 400), difficulty(rng)
        # A trial's own luck on images stays with its recipe, and its run's does not.
        recipe = rng.standard_normal((n_trials, 400))
        tried = easy[:80] + recipe[:, :80] + rng.normal(0, 1, (n_trials, 80)) > 0
        best = int(tried.mean(axis=1).argmax())
        if how == "apart":
            study = study_of(predictions(rng, other, 6, 5))
        else:
            images = 400 if how == "folds" else 80
            own = np.concatenate([recipe[best : best + 1], rng.standard_normal((5, 400))])
            latent = easy + own[:, None] + rng.normal(0, 1, (6, 5, 400))
            correct = (latent[..., :images] > 0).astype(np.float64)
            if how == "folds":
                order = rng.permutation(400).reshape(5, 80)
                folds = [[arm[r, order[r]] for r in range(5)] for arm in correct]
                study = study_of(folds, n_folds=5)
            else:
                study = study_of(correct)
        found = judge(study)
        calls += called(found)
        hurts += any(e.verdict == "degrades" for e in found)
        bias += float(np.mean([e.difference.estimate for e in found]))
    more = f"degrades {100 * hurts / n:.1f} %, bias {100 * bias / n:+.1f} points"
    return Row(f"winner of {n_trials} as baseline, judged by {how}", n, calls / n, more=more)


def best_of_many(n: int, n_trials: int, alike: float) -> Row:
    """How much too high the best of equal trials is, and what is said of it; `alike` in [0, 1]."""
    rng = np.random.default_rng(61)
    sums = np.zeros(3)
    for _ in range(n):
        common = math.sqrt(alike) * rng.standard_normal(N_IMAGES)
        own = math.sqrt(1 - alike) * rng.standard_normal((n_trials, N_IMAGES))
        correct = (common + own < 1.28).astype(np.float64)  # nine of ten
        best = float(correct.mean(axis=1).max())
        bound = selection_bias(best, N_IMAGES, n_trials)
        sums += best - 0.9, simulated_bias(correct), bound
    true, said, most = 100 * sums / n
    more = f"too high by {true:.1f} points; said: about {said:.1f}, at most {most:.1f}"
    return Row(f"best of {n_trials} equal trials, correlation {alike:g}", n, math.nan, more=more)


def folds(n: int, n_images: int, reps: int = 1, train: float = 0.05) -> Row:
    """Equal recipes, cross-fitted; training sets that overlap shift all folds alike."""
    rng = np.random.default_rng(59 + n_images)
    calls, covers = 0, 0.0
    for _ in range(n):
        easy = difficulty(rng, n_images)
        latent = easy + rng.standard_normal((4, 1, n_images))
        latent = latent + rng.normal(0, 1, (4, 5 * reps, n_images))
        common = rng.normal(0, train * math.sqrt(0.75), (4, 1, 1))
        latent = latent + common + rng.normal(0, train / 2, (4, 5 * reps, 1))
        latent = latent + rng.normal(0, 0.05, (4, 5 * reps, 1))
        cells: list[list[Array]] = [[] for _ in range(4)]
        for _ in range(reps):
            order = rng.permutation(n_images).reshape(5, -1)
            for r in range(5):
                for arm, cell in zip(latent, cells, strict=True):
                    cell.append((arm[len(cell), order[r]] > 0).astype(np.float64))
        found = judge(study_of(cells, n_folds=5))
        calls += called(found)
        covers += covered(found)
    name = f"5 folds × {reps} of {n_images} images, 3 levels"
    return Row(name, n, calls / n, covers=covers / n)


def real_rows(n: int, old: Old) -> Iterator[Row]:
    """Resample real predictions: two recipes, whose labels are swapped image by image."""
    table = np.load(TABLE)
    for name in sorted({key.partition("/")[0] for key in table.files}):
        arms = np.stack([table[key] for key in table.files if key.startswith(f"{name}/")])
        for k in (3, 5, 10):
            what = f"real {name}: labels swapped by image, n = {k}"
            yield equal_recipes(what, functools.partial(_swapped, arms=arms, n_seeds=k), n, old)


def _swapped(rng: np.random.Generator, arms: Array, n_seeds: int) -> Array:
    """Draw 80 images and seeds of real runs; which recipe a level is changes with the image."""
    images = rng.choice(arms.shape[-1], N_IMAGES, replace=True)
    seeds = rng.choice(arms.shape[1], n_seeds, replace=False)
    recipe = rng.permuted(np.tile(np.arange(len(arms)), (N_IMAGES, 1)), axis=1).T[:4]  # (4, N)
    return np.stack(
        [np.stack([arms[recipe[k], s, images] for s in seeds]) for k in range(len(recipe))]
    ).astype(np.float64)


def power(n: int, old: Old) -> Iterator[Row]:
    """Studies in which one of three levels is better: how often it is found."""
    for n_images, n_seeds in ((80, 5), (80, 10), (400, 5), (2000, 5)):
        for shift in (0.3, 1.0):
            rng = np.random.default_rng(n_images + n_seeds)
            hits, scores = 0, []
            for _ in range(n):
                correct = predictions(
                    rng, difficulty(rng, n_images), 4, n_seeds, shift=(0, shift, 0, 0)
                )
                hits += judge(study_of(correct))[0].verdict == "improves"
                scores.append(correct.mean(axis=-1))
            gain = 100 * float(np.mean([s[1].mean() - s[0].mean() for s in scores]))
            before = old.judge(np.array(scores), n_images=n_images)
            what = f"power: {gain:.1f} points, {n_images} images, n = {n_seeds}"
            yield Row(what, n, hits / n, before=before["calls"])


# Real predictions


def record(data: str, work: Path) -> None:
    """Train four recipes with 20 seeds each, and keep what they get right."""
    from study.record.frames import read_predictions
    from study.record.record import Record

    name = Path(data).name
    config = work / f"{name}.toml"
    work.mkdir(parents=True, exist_ok=True)
    config.write_text(
        '[train]\nimage_size = 96\nfreeze_depth = 4\nepochs = 3\nhead_init = "default"\n'
        "[ablation]\nkeep_checkpoints = false\nreplicates = 20\nfolds = 1\n"
        "[ablation.factors]\nhead_lr_mult = [10.0]\naugment = ['none']\nbatch_size = [16]\n"
    )
    database = work / "studies.db"
    study = f"{name}-real"
    command = ["ablate", str(config), "--data", data, "--name", study, "--storage", str(database)]
    more = ["--set", f"study.output={work / 'runs'}", "--set", "data.val_fraction=0.4"]
    subprocess.run([sys.executable, "-m", "study", *command, *more], check=True)
    with Record(str(database)) as store:
        found = read_predictions(store, study)
        rows = store.trials(store.study(study).id)
    arms: dict[str, list[NDArray[np.bool_]]] = {}
    for row in rows:
        labels, predicted = found[row.number]
        arms.setdefault(f"{row.factor}={row.level}", []).append(labels == predicted)
    kept = dict(np.load(TABLE)) if TABLE.exists() else {}
    kept |= {f"{name}/{arm}": np.array(runs) for arm, runs in arms.items()}
    np.savez_compressed(TABLE, **kept)


def rows_of(n: int, old: Old) -> Iterator[Row]:
    """Give all rows of the table."""
    yield from null_rows(n, old)
    yield from real_rows(n, old)
    yield from (top_ups(n, 1), top_ups(n, 3), several_designs(n), with_test_split(n))
    yield from (adaptive(n), factorial(n), path(n), equivalence(n, old))
    yield from (folds(n, 200), folds(n, 400), folds(n, 1500), folds(n, 400, reps=2))
    for how in ("split", "folds", "apart"):
        for n_trials in (10, 30, 100):
            yield winners(n, n_trials, how)
    for n_trials in (10, 30, 100):
        yield from (best_of_many(n // 4, n_trials, alike) for alike in (0.0, 0.5, 0.9))
    yield from power(n // 2, old)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=2000)
    parser.add_argument("--record", action="store_true", help="make predictions of real runs")
    parser.add_argument("--data")
    parser.add_argument("--work", type=Path, default=Path("predictions"))
    given = parser.parse_args()
    if given.record:
        record(given.data, given.work)
        return
    begin, n, old = time.perf_counter(), given.studies, Old(BEFORE)
    print(f"{datetime.now():%Y-%m-%d}; shares in %, ± one Monte-Carlo standard error")
    print(f"{'what':58}  {'n':>6}  called       {BEFORE}      these images  covers")
    for row in rows_of(n, old):
        print(row, flush=True)
    print(f"{time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
