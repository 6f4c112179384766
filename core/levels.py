"""What each freeze level of a backbone freezes, in words and numbers for its user."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from core.config import MAX_FREEZE_DEPTH
from core.stages import Stages


@dataclass(frozen=True, slots=True)
class Level:
    """One freeze level of a backbone, as `study backbones NAME` shows it.

    Attributes:
        depth: The level.
        newly_frozen: Modules that it freezes and the level below it does not.
        trained_parameters: Number of scalars that are still trained, head included.
        frozen_flops_share: Share of the forward pass that is frozen, in [0, 1].
    """

    depth: int
    newly_frozen: tuple[str, ...]
    trained_parameters: int
    frozen_flops_share: float


def describe_levels(model: nn.Module, stages: Stages) -> list[Level]:
    """List the freeze levels, 0 to `MAX_FREEZE_DEPTH`."""
    levels = []
    for depth in range(MAX_FREEZE_DEPTH + 1):
        before = set(stages.eval_modules[depth - 1]) if depth else set()
        named = [
            name
            for name in stages.eval_modules[depth]
            if name not in before and not _all_within(name, before, model)
        ]
        levels.append(
            Level(
                depth,
                tuple(_shorten(named, before)),
                sum(stages.sizes[depth : MAX_FREEZE_DEPTH + 1]),
                stages.frozen_flops_share(depth),
            )
        )
    return levels


def _all_within(name: str, before: set[str], model: nn.Module) -> bool:
    """Say whether every parameter of a module was already in one of the named modules."""
    module = model.get_submodule(name)
    inner = [f"{name}.{p}" for p, _ in module.named_parameters()]
    return not inner or all(any(p.startswith(f"{b}.") for b in before) for p in inner)


def _shorten(names: list[str], before: set[str]) -> Iterator[str]:
    """Write `blocks` as `rest of blocks` where a part of it was frozen earlier."""
    for name in names:
        rest = any(b.startswith(f"{name}.") for b in before)
        yield f"rest of {name}" if rest else name
