"""A study's trials as the record has them, and what a search decides by them."""

from study.progress import BestTrial, Counts
from study.record.models import UNFINISHED, Trial
from study.runner import RERUN_REASONS, Work


class Roster:
    """The trials of a study, read once and then one by one as they change.

    Args:
        work: The study.

    Attributes:
        rows: The trials by number.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        self.rows: dict[int, Trial] = {}
        self.reload()

    def reload(self, number: int | None = None) -> None:
        """Read a trial again; None for all of them."""
        store, study_id = self._work.store, self._work.study_id
        if number is None:
            self.rows = {row.number: row for row in store.trials(study_id)}
        else:
            self.rows[number] = store.trial(study_id, number)

    def finished(self) -> list[Trial]:
        """Return the trials that count: not those cut short from outside."""
        return [
            row
            for row in self.rows.values()
            if row.state not in UNFINISHED and row.reason not in RERUN_REASONS
        ]

    def n_settings(self) -> int:
        """Count the different settings of the trials that count."""
        return len({row.config_hash for row in self.finished()})

    def ranking(self) -> list[Trial]:
        """Return the complete trials, best first; of equals the earlier one."""
        complete = [row for row in self.rows.values() if row.state == "complete"]
        return sorted(complete, key=lambda row: row.rank)

    def since_best(self) -> int:
        """Count the trials after the best one; all of them before one is complete."""
        ranking = self.ranking()
        best = ranking[0].number if ranking else -1
        return sum(row.number > best for row in self.finished())

    def best(self) -> BestTrial | None:
        """Return the best complete trial, if there is one."""
        ranking = self.ranking()
        return BestTrial.of(ranking[0]) if ranking else None

    def counts(self) -> Counts:
        """Count the trials by state."""
        states = [row.state for row in self.rows.values()]
        return Counts(
            complete=states.count("complete"),
            pruned=states.count("pruned"),
            failed=states.count("failed"),
            running=states.count("running"),
            cut_short=sum(row.reason in RERUN_REASONS for row in self.rows.values()),
        )
