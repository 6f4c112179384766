"""The paused trials of a study: which goes on next, and their traces on disk and in the record."""

from collections.abc import Iterator

from optuna.trial import TrialState

from core.paused import paused_after
from study.ledger import RERUNS, Ledger
from study.promotion import PAUSED_FOLDER, Promotion, Standing, worth_keeping
from study.rows import TrialRow
from study.runner import Work, pause_file
from study.session import end_killed


def find_paused(work: Work) -> dict[int, int]:
    """Return the trials that were left paused, with the epochs that they have done.

    A trial whose process died while it went on counts as well: it stands where it was paused.
    """
    found = {}
    for row in work.store.trials(work.study_id):
        if row.state == "paused":
            found[row.number] = row.epochs_done
        elif row.state == "running":
            done = paused_after(pause_file(work.output, row.number))
            if done is not None:
                found[row.number] = done
    return found


class PausedTrials:
    """The paused trials of the study that this process runs.

    Args:
        work: What the trials share.
        ledger: Optuna's side, which knows what is paused.
        promotion: Says what goes on; None for a pruner that pauses nothing.
    """

    def __init__(self, work: Work, ledger: Ledger, promotion: Promotion | None) -> None:
        self._work = work
        self._ledger = ledger
        self._promotion = promotion

    def standings(self) -> list[Standing]:
        """Rank them, those first that are to go on first."""
        if self._promotion is None or not self._ledger.paused:
            return []
        return self._promotion.standings(self._ledger.trials(), self._ledger.paused)

    def next_number(self) -> int | None:
        """Return the trial that is to go on before a new one begins, if there is one."""
        return next((row.number for row in self.standings() if row.is_promotable), None)

    def keep_states(self, n_trials: int) -> None:
        """Keep on disk what a study of so many trials may still go on with."""
        kept = worth_keeping(self.standings(), n_trials)
        files = {pause_file(self._work.output, number) for number in kept}
        folder = self._work.output / PAUSED_FOLDER
        if not folder.is_dir():
            return
        for file in folder.iterdir():
            if file not in files:
                file.unlink(missing_ok=True)
        if not files:
            folder.rmdir()

    def give_up(self) -> Iterator[int]:
        """End all of them as pruned, and give their numbers."""
        store, progress = self._work.store, self._work.progress
        for number in sorted(self._ledger.paused):
            self._ledger.tell(self._ledger.go_on(number), TrialState.PRUNED)
            row = store.trial(self._work.study_id, number)
            reason = f"pruned after epoch {row.epochs_done}"
            store.prune_paused(row.id, reason)
            spent = row.duration_s or 0.0
            progress.trial_ended(number, "pruned", row.value, reason, spent, row.ranked_by)
            yield number

    def recover(self, found: dict[int, int], most_reruns: int) -> Iterator[TrialRow]:
        """Bring the record in line with Optuna's tables after a process died.

        Args:
            found: From `find_paused`.
            most_reruns: A trial that took the process down with it more often is not continued.

        Yields:
            Trials that have to begin anew.
        """
        work, ledger = self._work, self._ledger
        states = {trial.number: trial.state for trial in ledger.trials()}
        for row in work.store.trials(work.study_id):
            if row.state == "paused" and row.number not in ledger.paused:
                if states[row.number] is TrialState.PRUNED:  # it died while it gave them up
                    work.store.prune_paused(row.id, f"pruned after epoch {row.epochs_done}")
                else:
                    end_killed(work, row)
                    yield row
            elif row.state == "running" and row.number in ledger.paused:
                reruns = int(ledger.user_attrs(row.number).get(RERUNS, 0)) + 1
                if reruns <= most_reruns:
                    ledger.note(row.number, RERUNS, reruns)
                    self._put_back(row, found[row.number])
                else:
                    ledger.tell(ledger.go_on(row.number), TrialState.FAIL)
                    end_killed(work, row)

    def _put_back(self, row: TrialRow, epochs_done: int) -> None:
        """Put a trial whose process died back to where it was paused."""
        store = self._work.store
        store.cut_epochs(row.id, epochs_done)
        *_, best = (metrics for metrics in store.epochs(row.id) if metrics.is_best)
        store.end_trial(
            row.id,
            "paused",
            reason=f"paused after epoch {epochs_done}",
            value=best.val_acc,
            score=best.ranked_by,
            best_epoch=best.epoch,
            epochs_done=epochs_done,
            duration_s=row.duration_s or 0.0,
            checkpoint=None,
        )
        self._work.progress.note(
            f"Trial {row.number} was cut short when its process died; it goes on after epoch "
            f"{epochs_done}."
        )
