"""Successive halving whose stopped trials are paused, and go on when they turn out good enough."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import optuna
from optuna.pruners import BasePruner
from optuna.trial import FrozenTrial, TrialState

Scores = Mapping[int, Mapping[int, float]]
"""What trials are ranked by: number -> epochs done -> score, higher is better."""
REDUCTION_FACTOR = 3
"""One in so many trials of a rung goes on to the next (Li et al. 2020 use 4, Hyperband 3)."""
PAUSED_FOLDER = "paused"
"""Where a study keeps the states of its paused trials, in its output folder."""
# Paused states that are kept at most. One that is dropped costs its epochs a second time, should
# its trial go on, so disk is bounded and no result depends on it. Assumption.
_MOST_STATES = 32


def rungs(epochs: int) -> tuple[int, ...]:
    """Return after how many epochs trials are paused: 1, 3, 9, ...

    The last rung is the one from which the end is about as far as from rung to rung: one close
    to the end would save nothing and let fewer trials arrive there. It is at most
    `epochs` / sqrt(3): 1 and 3 for 10 epochs, 1, 3 and 9 for 20.
    """
    found = []
    rung = 1
    while rung * math.sqrt(REDUCTION_FACTOR) <= epochs:
        found.append(rung)
        rung *= REDUCTION_FACTOR
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a paused trial stands.

    Attributes:
        number: The trial.
        epochs: Epochs that it has done.
        place: Its place among all trials that came so far, the best is 0.
        level: Which rung that is, from 0; -1 where it was interrupted between two.
        is_promotable: Whether it may go on.
    """

    number: int
    epochs: int
    place: int
    level: int
    is_promotable: bool


class Promotion(BasePruner):
    """Asynchronous successive halving, with trials that wait instead of trials that are lost.

    A trial stops at a rung unless it is in the best third of all trials that have come so far;
    it may go on as soon as it is, because others came after it. As an Optuna pruner by itself it
    only stops trials.

    Failed trials are no members of a rung, and of trials with equal settings only the first is.

    Args:
        epochs: A trial's full length.
        scores: What trials are ranked by, by number and epochs done; the value that Optuna was
            told where it is not in here.

    Attributes:
        rungs: Epochs done at which trials stop.

    References:
        Li et al. 2020, A System for Massively Parallel Hyperparameter Tuning (ASHA),
        https://arxiv.org/abs/1810.05934, algorithm 2.
    """

    def __init__(self, epochs: int, scores: Scores | None = None) -> None:
        self.rungs = rungs(epochs)
        self._scores = scores if scores is not None else {}

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Say whether a trial is to stop where it is, for now."""
        if trial.last_step not in self.rungs:
            return False
        reached = self._ranked(study.get_trials(deepcopy=False), trial.last_step)
        return trial.number not in _best_third(reached)

    def standings(self, trials: Sequence[FrozenTrial], paused: Collection[int]) -> list[Standing]:
        """Rank the paused trials: the interrupted first, then by rung from the top, then by value.

        Args:
            trials: All trials of the study.
            paused: Numbers of those that are paused.
        """
        at: dict[int, list[int]] = {}
        for trial in trials:
            if trial.number in paused:
                at.setdefault(trial.last_step or 0, []).append(trial.number)
        found = [
            Standing(number, epochs, place=0, level=-1, is_promotable=True)
            for epochs in sorted(at.keys() - set(self.rungs), reverse=True)
            for number in at[epochs]
        ]
        for level in reversed(range(len(self.rungs))):
            epochs = self.rungs[level]
            waiting = at.get(epochs, ())
            reached = self._ranked(trials, epochs) if waiting else []
            best = _best_third(reached)
            found += [
                Standing(number, epochs, place, level, number in best)
                for place, number in enumerate(reached)
                if number in waiting
            ]
        return found

    def _ranked(self, trials: Sequence[FrozenTrial], epochs: int) -> list[int]:
        """Return the numbers of the trials that came so far, the best first, then the earlier."""
        first: dict[tuple[tuple[str, object], ...], tuple[float, int]] = {}
        for trial in trials:
            if trial.state is not TrialState.FAIL and epochs in trial.intermediate_values:
                settings = tuple(sorted(trial.params.items()))
                told = trial.intermediate_values[epochs]
                score = self._scores.get(trial.number, {}).get(epochs, told)
                first.setdefault(settings, (-score, trial.number))
        return [number for _, number in sorted(first.values())]


def worth_keeping(standings: Sequence[Standing], n_trials: int) -> list[int]:
    """Return the paused trials whose states are to stay on disk.

    These are the trials that could still go on: of a study of N trials at most N / 3 come to the
    second rung, N / 9 to the third, so a trial of a lower place never will. Of these the first
    32; the best of all stays, since a study without a complete trial ends by completing it.

    Args:
        standings: From `Promotion.standings`.
        n_trials: Trials that the study shall have.
    """
    kept = [
        row.number
        for row in standings
        if row.level < 0 or row.place < n_trials // REDUCTION_FACTOR ** (row.level + 1)
    ]
    return kept[:_MOST_STATES] or [row.number for row in standings[:1]]


def _best_third(reached: Sequence[int]) -> set[int]:
    return set(reached[: len(reached) // REDUCTION_FACTOR])
