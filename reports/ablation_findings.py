"""What an ablation found, in sentences."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from reports.ablation import Ablation
from reports.effects import Effect, Verdict, roughly
from reports.factorial import Contrast
from reports.methods import test_split_words
from reports.path import Step
from reports.publish import difference_words, p_equals, signed
from reports.words import plural


@dataclass(frozen=True, slots=True)
class Finding:
    """A sentence of the summary.

    Attributes:
        head: What kind of finding it is.
        text: The rest.
    """

    head: str
    text: str


def level_findings(ablation: Ablation, effects: Sequence[Effect]) -> Iterator[Finding]:
    """Say which levels helped, hurt, made no difference or are open."""
    margin = f"±{100 * ablation.rules.margin:g} points"
    heads: dict[Verdict, str] = {
        "helps": "Better than the baseline:",
        "hurts": "Worse than the baseline:",
        "no difference": f"No difference beyond {margin}:",
        "identical": "Identical to the baseline in all seeds:",
        "fails": "Runs failed:",
        "inconclusive": "Inconclusive:",
    }
    for verdict, head in heads.items():
        found = [effect for effect in effects if effect.verdict == verdict]
        if not found:
            if verdict in ("helps", "hurts"):
                yield Finding(head, "no level, by the corrected test.")
            continue
        found.sort(key=lambda effect: -abs(effect.difference.estimate))
        yield Finding(head, "; ".join(_words_of(effect) for effect in found) + ".")
    yield _care(ablation)
    yield Finding("Test split:", test_split_words(ablation))


def _care(ablation: Ablation) -> Finding:
    """Say in a sentence what the findings rest on."""
    data, n = ablation.study.data, ablation.replicates
    split = "splits redrawn for each seed" if ablation.is_resplit else "a fixed split"
    return Finding(
        "Read with care:",
        f"{plural(n, 'seed')} on {data.get('n_val', 0)} validation images ({split}), each run "
        "at its best epoch. The intervals say what other seeds would give, not other images or "
        "other data; p values are corrected for all levels together.",
    )


def _words_of(effect: Effect) -> str:
    label, points = effect.arm.label, signed(100 * effect.difference.estimate, 1)
    if effect.verdict == "fails":
        return f"{label} ({effect.arm.n_failed} of {effect.arm.n_run} runs)"
    if effect.verdict == "inconclusive":
        if effect.n < 2:
            return f"{label} ({'too few replicates' if effect.n else 'not run yet'})"
        more = "over 1,000" if effect.n_needed is None else f"about {roughly(effect.n_needed)}"
        return f"{label} ({points} points; {more} replicates would settle it)"
    if effect.verdict == "identical":
        return f"{label} ({plural(effect.n, 'seed')})"
    if effect.verdict == "no difference":
        return f"{label} ({points} points)"
    return f"{label} ({points} points, {p_equals(effect.p_family)})"


def contrast_findings(contrasts: Sequence[Contrast], alpha: float) -> Iterator[Finding]:
    """Say which main effects and interactions are distinguishable from noise."""

    def is_clear(contrast: Contrast) -> bool:
        p = contrast.p_family if math.isfinite(contrast.p_family) else contrast.p
        return p <= alpha

    if not contrasts:
        yield Finding("Not estimated:", "no replicate has a finished run of every setting.")
        return
    if contrasts[0].n < 2:
        yield Finding("Not tested:", "one replicate says nothing of the scatter of runs.")
        return
    clear = [contrast for contrast in contrasts if is_clear(contrast)]
    text = "; ".join(
        f"{c.name}{f' from {c.low} to {c.high}' if c.high else ' (interaction)'} "
        f"({difference_words(c.effect)} points)"
        for c in clear
    )
    yield Finding("Matters:", f"{text}." if text else "no effect is distinguishable from noise.")
    rest = [contrast.name for contrast in contrasts if not is_clear(contrast)]
    if rest:
        yield Finding("Not distinguishable from noise:", ", ".join(rest) + ".")


def path_findings(steps: Sequence[Step], alpha: float) -> Iterator[Finding]:
    """Say in what order a path went, and which of its steps gained."""
    if len(steps) < 2:
        yield Finding("Path:", "no step was finished yet.")
        return
    order = ", then ".join(step.factor for step in steps[1:])
    yield Finding("Order:", f"{order}.")
    clear = [
        f"{step.factor} ({difference_words(step.gain)} points)"
        for step in steps[1:]
        if step.gain is not None and step.p <= alpha
    ]
    yield Finding(
        "Steps that changed the accuracy:",
        "; ".join(clear) + "." if clear else "none, by its test.",
    )
    total = steps[-1].total
    if total is not None:
        n = plural(len(steps) - 1, "step")
        yield Finding("In all:", f"{difference_words(total)} points over {n}.")
