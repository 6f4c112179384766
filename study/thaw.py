"""Probe first, then thaw: a sampler that buys accuracy where a second gains most.

Every backbone is first tried with its head alone, the cheapest one first. From then on a Gaussian
process over all settings, taught by whole and by cut trials, says what each candidate may gain
over the best setting known, and a count of arithmetic what it costs: drawn is the candidate with
the highest expected improvement for its cost. Once that is a thawed setting, the few that
`study.opening` knows are taken first.

A draw is a function of the trials so far and the seed. So that it does not depend on the clock,
costs are counted and never timed: two runs of a study, or one that was killed and resumed, draw
alike on machines of any load.

References:
    Jones et al. 1998, https://doi.org/10.1023/A:1008306431147 (expected improvement); Snoek et al.
    2012, https://arxiv.org/abs/1206.2944 (per second); Lee et al. 2020,
    https://arxiv.org/abs/2003.10870 (less weight to the cost as the budget goes); Arango et al.
    2024, https://arxiv.org/abs/2306.03828 (Quick-Tune: fine-tuning with costs and curves);
    Hvarfner et al. 2022, https://arxiv.org/abs/2204.11051 (a belief about good settings that
    fades).
"""

import contextlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.random import Generator
from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from study.axes import Axes, FloatArray
from study.cost import CostModel
from study.opening import Opening
from study.promotion import Scores
from study.response import Curve, Response, by_importance, final_scores, log_improvement

# Weight of the cost: the improvement is divided by the cost to this power. Cooling (Lee et al.)
# takes it from 1 to 0 over a budget, which is not known here; one half is its mean. On four
# planted landscapes, four seeds each, 0 and 0.5 ended 2.1 and 2.4 points below the best, and 1,
# which hardly ever leaves the heads, 3.4. (Before trials were opened with known settings.)
COST_POWER = 0.5
# What the belief about good rates is worth against so many trials, as Hvarfner et al. have it, and
# its width as a share of the searched range, an assumption.
_BELIEF, _BELIEF_WIDTH = 10.0, 0.2
_BELIEVED = ("base_lr", "head_lr_mult")
_N_DRAWN, _N_AROUND, _N_BEST = 256, 24, 6
_NUDGES = (0.03, 0.1, 0.25)
_MOST_LISTED = 2048
_RUNS = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)


@dataclass(frozen=True, slots=True)
class Outlook:
    """What the sampler is told of a study beside its trials.

    Attributes:
        epochs: A trial's full length; None for the longest seen.
        n_val: Validation pictures, which decide how far accuracies are to be trusted; None for
            scores by loss, whose noise is for the most part that of the pictures and common to
            all trials.
        cost: Says what a setting costs; None counts all alike.
        start: Settings to probe with, beyond the known recipe's.
        counts_seconds: Whether the study's budget is time; where it is a number of trials, a cheap
            trial takes as much of it as a dear one, and the cost is left out of the draw.
        scores: What trials are ranked by, in [0, 1], by number and epochs done; the value that
            Optuna was told where a trial is not in here.
    """

    epochs: int | None = None
    n_val: int | None = None
    cost: CostModel | None = None
    start: Mapping[str, Any] = field(default_factory=dict)
    counts_seconds: bool = True
    scores: Scores = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Seen:
    """Trials that say something, as rows.

    Attributes:
        rows: Their settings, (n, dimensions), of those with a curve first.
        curves: Of each.
        taken: Settings that are not to be drawn again.
        failed: Settings that failed and were not run since.
        cached: Epochs whose frozen outputs are there, by what reads them.
        tried: Rows that were begun, whatever became of them.
    """

    rows: FloatArray
    curves: list[Curve]
    taken: set[tuple[float, ...]]
    failed: list[list[float]]
    cached: dict[tuple[Any, ...], int]
    tried: FloatArray


class ThawSampler(BaseSampler):
    """Draws by expected improvement for the cost, after a probe of every backbone.

    Args:
        seed: Of this draw; differs from trial to trial.
        space: Distributions by name.
        outlook: What is known of the study.
        cost_power: Weight of the cost; 0 leaves it out.
    """

    def __init__(
        self,
        seed: int,
        space: Mapping[str, BaseDistribution],
        outlook: Outlook | None = None,
        *,
        cost_power: float = COST_POWER,
    ) -> None:
        self._seed = seed
        self._space = dict(space)
        self._axes = Axes(self._space)
        self._outlook = outlook or Outlook()
        self._opening = Opening(self._axes, self._outlook.start)
        self._cost_power = cost_power if self._outlook.counts_seconds else 0.0
        self._apart = RandomSampler(seed=seed)

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return all dimensions: they are drawn together."""
        return self._space

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Draw a setting that is not of the space at random."""
        return self._apart.sample_independent(study, trial, param_name, param_distribution)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return the next trial's settings."""
        if not self._space:
            return {}
        # Hyperband shows a sampler the trials of one bracket; here those of all brackets count.
        whole = getattr(study, "_study", study)
        trials = [t for t in whole.get_trials(deepcopy=False) if t.number != trial.number]
        sign = -1.0 if study.direction is StudyDirection.MINIMIZE else 1.0
        seen = self._look(trials, sign)
        row = self._opening.probe(seen.tried, lambda rows: self._costs(rows, seen))
        if row is None:
            row = self._thaw(seen, np.random.default_rng(self._seed))
            if self._opening.is_thawed(row[None])[0]:
                scores, _ = final_scores(seen.curves)
                known = self._opening.thawed(row, seen.tried, seen.rows, scores)
                row = row if known is None else known
        return self._axes.params(row)

    def _look(self, trials: Iterable[FrozenTrial], sign: float) -> _Seen:
        """Gather what the trials say."""
        rows: list[list[float]] = []
        tried: list[list[float]] = []
        failed: list[list[float]] = []
        curves: list[Curve] = []
        cached: dict[tuple[Any, ...], int] = {}
        usable = [(t, row) for t in trials if (row := self._row(t)) is not None]
        longest = max((max(t.intermediate_values, default=0) for t, _ in usable), default=0)
        for trial, row in usable:
            tried.append(row)
            done = max(trial.intermediate_values, default=0)
            if self._outlook.cost is not None:
                key = self._outlook.cost.shared_by(trial.params)
                cached[key] = max(cached.get(key, 0), done)
            if trial.state is TrialState.FAIL:
                failed.append(row)
                continue
            scores = self._outlook.scores.get(trial.number)
            curve = _curve(trial, self._length(trial, longest), sign, scores)
            if curve is not None:
                rows.append(row)
                curves.append(curve)
        run = {tuple(row) for (t, _), row in zip(usable, tried, strict=True) if t.state in _RUNS}
        failed = [row for row in failed if tuple(row) not in run]
        width = len(self._axes.axes)
        return _Seen(
            np.array(rows).reshape(-1, width),
            curves,
            run | {tuple(row) for row in failed},
            failed,
            cached,
            np.array(tried).reshape(-1, width),
        )

    def _row(self, trial: FrozenTrial) -> list[float] | None:
        return None if trial.state is TrialState.WAITING else self._axes.row(trial.params)

    def _length(self, trial: FrozenTrial, longest: int) -> int:
        searched = trial.params.get("epochs")
        return int(searched or self._outlook.epochs or longest or 1)

    def _thaw(self, seen: _Seen, rng: Generator) -> FloatArray:
        if not seen.curves:
            return np.asarray(self._fresh(self._axes.draw(rng, _N_DRAWN), seen)[0])
        scores, variances = final_scores(seen.curves)
        rows = seen.rows
        if seen.failed:
            rows = np.vstack([rows, seen.failed])
            scores = np.append(scores, np.full(len(seen.failed), scores.min()))
            variances = np.append(variances, np.zeros(len(seen.failed)))
        if self._outlook.n_val:
            p = np.clip(scores, 0.5 / self._outlook.n_val, 1 - 0.5 / self._outlook.n_val)
            variances = variances + p * (1 - p) / self._outlook.n_val
        with _one_thread():
            order = by_importance(scores, rng)
            response = Response(self._axes.inputs(rows), scores, variances, order)
            means = response.predict(self._axes.inputs(rows)).mean
            best = rows[int(means.argmax())]
            leaders = rows[np.argsort(-means, kind="stable")]
            candidates = self._candidates(leaders, seen, rng)
            worth = self._worth(candidates, response, best, seen)
            top = candidates[np.argsort(-worth, kind="stable")[:_N_BEST]]
            refined = self._fresh(self._around(top, rng), seen)
            again = np.vstack([top, refined])
            worth = self._worth(again, response, best, seen)
        return np.asarray(again[int(np.argmax(worth))])

    def _candidates(self, leaders: FloatArray, seen: _Seen, rng: Generator) -> FloatArray:
        """Return settings to choose from: all of a small space, else drawn and near the best."""
        n = self._axes.n_points
        if n is not None and n <= _MOST_LISTED:
            return self._fresh(self._axes.every(), seen)
        near = [self._around(leaders[:_N_BEST], rng), self._steps(leaders)]
        return self._fresh(np.vstack([self._axes.draw(rng, _N_DRAWN), *near]), seen)

    def _around(self, rows: FloatArray, rng: Generator) -> FloatArray:
        repeated = np.repeat(rows, _N_AROUND // len(_NUDGES), axis=0)
        return np.vstack([self._axes.nudge(repeated, rng, scale) for scale in _NUDGES])

    def _steps(self, leaders: FloatArray) -> FloatArray:
        """Return each backbone's best settings at every freeze level."""
        at, depth = self._axes.at("backbone"), self._axes.at("freeze_depth")
        if depth is None:
            return leaders[:0]
        levels = self._axes.axes[depth].listed()
        assert levels is not None  # levels are whole numbers
        backbones = [None] if at is None else list(np.unique(leaders[:, at]))
        found = []
        for backbone in backbones:
            own = leaders if backbone is None else leaders[leaders[:, at] == backbone]
            for row in own[:2]:
                moved = np.repeat(row[None], len(levels), axis=0)
                moved[:, depth] = levels
                found.append(moved)
        return np.vstack(found)

    def _fresh(self, rows: FloatArray, seen: _Seen) -> FloatArray:
        """Leave out what was run already, unless that is all there is."""
        kept = [i for i, row in enumerate(rows.tolist()) if tuple(row) not in seen.taken]
        return rows[kept] if kept else rows

    def _worth(
        self, rows: FloatArray, response: Response, best: FloatArray, seen: _Seen
    ) -> FloatArray:
        """Return the logarithm of the expected improvement for the cost.

        Counted is how far a trial, with its noise, may lift what is believed of its setting above
        what is believed of the best one: that is little where much is known already, and where
        the two would rise together (the knowledge gradient of a pair).
        """
        at = self._axes.inputs(best[None])[0]
        told = response.predict(self._axes.inputs(rows), at)
        top = response.predict(at[None])
        noise = response.noise(told.mean, self._outlook.n_val)
        moved = np.abs(told.variance - told.shared) / np.sqrt(told.variance + noise)
        moved = np.maximum(moved, 1e-9)
        worth = log_improvement((told.mean - top.mean) / moved) + np.log(moved)
        worth = worth - self._cost_power * np.log(self._costs(rows, seen))
        # The many cheap heads do not use up what is believed of thawed settings.
        tried = self._opening.is_thawed(seen.tried)
        n_alike = np.where(self._opening.is_thawed(rows), tried.sum(), (~tried).sum())
        return np.asarray(worth + self._belief(rows) * _BELIEF / (1 + n_alike))

    def _belief(self, rows: FloatArray) -> FloatArray:
        """Return the logarithm of how likely good settings are near the known recipe's rates."""
        start = self._opening.recipe()
        total = np.zeros(len(rows))
        for name in _BELIEVED:
            k = self._axes.at(name)
            if k is not None and self._axes.axes[k].is_ordered:
                axis = self._axes.axes[k]
                away = axis.units(rows[:, k]) - axis.units(start[k : k + 1])
                total -= 0.5 * (away / _BELIEF_WIDTH) ** 2
        return total

    def _costs(self, rows: FloatArray, seen: _Seen) -> FloatArray:
        cost = self._outlook.cost
        if cost is None:
            return np.ones(len(rows))
        known: dict[tuple[Any, ...], float] = {}
        costs = np.empty(len(rows))
        for i, row in enumerate(rows):
            params = self._axes.params(row)
            key = (*cost.shared_by(params), params.get("epochs"))
            if key not in known:
                known[key] = cost.predict(params, cached_epochs=seen.cached.get(key[:-1], 0))
            costs[i] = known[key]
        return costs


def _curve(
    trial: FrozenTrial, length: int, sign: float, scores: Mapping[int, float] | None
) -> Curve | None:
    told = {step: sign * value for step, value in trial.intermediate_values.items()}
    reached: dict[int, float] = {}
    best = -math.inf
    for step, score in sorted((told | dict(scores or {})).items()):
        if math.isfinite(score):
            best = max(best, score)
            reached[step] = best
    if trial.state is TrialState.COMPLETE and trial.value is not None:
        return Curve(reached, best if scores and reached else sign * trial.value, 1.0)
    if not reached:
        return None
    return Curve(reached, None, min(1.0, max(reached) / length))


def _one_thread() -> contextlib.AbstractContextManager[object]:
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1)  # type: ignore[no-any-return]  # untyped library
