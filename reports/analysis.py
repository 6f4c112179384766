"""A search's analysis: a model of its trials, how early their order shows, and its audit."""

from collections.abc import Iterator
from dataclasses import dataclass

from numpy.random import Generator

from reports.audit import Audit, audited_grid, rank_grid
from reports.figures import Draw, Drawing, Plan, drawn
from reports.publish import Grid, number_words
from reports.record import Record
from reports.surrogate import (
    PartialDependence,
    Surrogate,
    fit_surrogate,
    local_importance,
    partial_dependence,
)
from reports.surrogate_plots import (
    plot_early_rank,
    plot_local_importance,
    plot_partial_dependence,
)
from reports.words import is_missing

_SMALL = (3.5, 2.7)


@dataclass(frozen=True, slots=True)
class Analysis:
    """What the model of a search's trials and its audit say.

    Attributes:
        trust: Whether the model is to be trusted, in a sentence.
        dependences: Figures, one a setting.
        local: Figure of what decides around the best trial.
        early: Figure of how early the final order shows.
        grids: Tables of the audit.
        findings: Sentences of the audit.
    """

    trust: str
    dependences: tuple[Drawing, ...]
    local: Drawing
    early: Drawing
    grids: tuple[Grid, ...]
    findings: tuple[str, ...]

    @property
    def has_model(self) -> bool:
        """Say whether there were trials enough for a model."""
        return any(drawing.why_empty is None for drawing in self.dependences)

    @property
    def drawings(self) -> tuple[Drawing, ...]:
        """Return all figures, also those that are not drawn."""
        return (*self.dependences, self.local, self.early)


def analyse(record: Record, audit: Audit, rng: Generator) -> Analysis:
    """Analyse a search's trials, pruned ones included.

    Args:
        record: The search.
        audit: Its audit, perhaps without audited trials.
        rng: Source of the bootstrap draws.
    """
    dims = tuple(dim for dim in record.dims if not dim.is_single)
    surrogate = fit_surrogate(record.trials, record.epochs, dims, rng)
    found = partial_dependence(surrogate, rng)
    grids = [rank_grid(audit)] if audit.early.epochs else []
    if audit.trials:
        grids.append(audited_grid(audit))
    return Analysis(
        trust=_trust(surrogate),
        dependences=tuple(drawn(plan) for plan in _dependence_plans(surrogate, found)),
        local=drawn(_local_plan(surrogate, rng)),
        early=drawn(_early_plan(audit)),
        grids=tuple(grids),
        findings=tuple(audit.findings),
    )


def _trust(surrogate: Surrogate) -> str:
    if surrogate.why_empty is not None:
        return surrogate.why_empty
    told = surrogate.rank_correlation
    if told is None or is_missing(told.estimate):
        return "The model could not be checked on trials that it had not seen: do not trust it."
    text = (
        "On trials that it had not seen the model’s order agrees with the true one by a rank "
        f"correlation of {number_words(told.estimate)} (95 % interval {number_words(told.low)} "
        f"to {number_words(told.high)})"
    )
    return f"{text}." if surrogate.is_trusted else f"{text}: too little to trust it."


def _dependence_plans(
    surrogate: Surrogate, found: tuple[PartialDependence, ...]
) -> Iterator[Plan]:
    """Plan a figure a setting, also where there is none: that of an earlier report then goes."""
    for k, dim in enumerate(surrogate.dims):
        draw = _draw(found[k]) if found else _draw_nothing
        yield Plan(f"dependence-{k + 1}", dim.name, "", draw, surrogate.why_empty, _SMALL)


def _draw_nothing(ax: object) -> None:
    raise AssertionError("a figure that is not drawn has its reason")


def _draw(found: PartialDependence) -> Draw:
    return lambda ax: plot_partial_dependence(found, ax)


def _local_plan(surrogate: Surrogate, rng: Generator) -> Plan:
    factors = local_importance(surrogate, rng)
    return Plan(
        "local-importance",
        "What decides around the best trial",
        "One setting varied, the others held at the best trial’s values (Biedenkapp et al. 2018); "
        "whiskers: 95 % interval.",
        lambda ax: plot_local_importance(factors, ax),
        surrogate.why_empty,
        (4.6, max(1.9, 1.1 + 0.34 * len(factors))),
    )


def _early_plan(audit: Audit) -> Plan:
    return Plan(
        "early-rank",
        "How early the final order shows",
        f"Rank correlation of each epoch with the final accuracy. {audit.early.caveat or ''}",
        lambda ax: plot_early_rank(audit.early, ax),
        audit.early.why_empty,
    )
