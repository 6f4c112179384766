"""Freeze levels of any backbone, from the cut points of its traced graph.

A *cut point* is a place in the graph where exactly one tensor is alive, so that everything before
it is a prefix and everything after it a suffix. A level ends at the cut point, preferably at the
border of a block, before which nearest to a given share of the forward pass lies. Every backbone
so offers the same levels: 0 freezes nothing, 1 to 4 about a quarter, a half, three quarters and
nine tenths, 5 all but the head.
"""

import itertools
from dataclasses import dataclass

import numpy as np
from torch import nn

from core.config import MAX_FREEZE_DEPTH
from core.models.fx_graph import CutPoint, TracedGraph

# Nine tenths, since thawing pays most where little is thawed: on two cores the last stage of
# EfficientNet-Lite0 took 25 s, the last two 180 s, for nearly the same gain (measured).
_SHARES = (0.25, 0.5, 0.75, 0.9)
# A last stage of fewer weights than this share of the trunk (ConvNeXt's norm behind the pooling,
# say) is no level of its own. Assumption.
_LEAST_REST = 0.01
# What one level of module nesting counts for, in shares of the forward pass: enough to end at a
# block's border, not enough to skip a whole block. Assumption.
_NESTING_PENALTY = 0.02


class StagesError(ValueError):
    """The network cannot be divided into freeze levels."""


@dataclass(frozen=True, slots=True)
class Stages:
    """Which parts of a network each freeze level freezes.

    Attributes:
        stage_of: Stage of every parameter by its name: 0 to 4 in the backbone, counted from the
            input, and `MAX_FREEZE_DEPTH` for the head. Level d freezes the stages below d.
        eval_modules: For each level, the modules that run in eval mode: all their work lies in
            the frozen prefix. The names are maximal: a child of a named module is not named.
        flops: Forward FLOPs per image in each stage, the head's last.
        sizes: Parameters (scalars) in each stage, the head's last, then those never used.
        limits: For each level, the last node of the traced graph that it freezes; -1 for none.
        numels: For levels 1 to 4, numbers per image in what the frozen part hands over.
    """

    stage_of: dict[str, int]
    eval_modules: tuple[tuple[str, ...], ...]
    flops: tuple[int, ...]
    sizes: tuple[int, ...]
    limits: tuple[int, ...]
    numels: tuple[int, ...]

    def frozen_flops_share(self, depth: int) -> float:
        """Return the share of the forward pass that level `depth` freezes, in [0, 1]."""
        return sum(self.flops[:depth]) / max(1, sum(self.flops))


@dataclass(frozen=True, slots=True)
class Level:
    """One freeze level of a backbone, as `study backbones NAME` shows it.

    Attributes:
        newly_frozen: Modules that it freezes and the level below it does not.
        trained_parameters: Number of scalars that are still trained, head included.
        frozen_flops_share: Share of the forward pass that is frozen, in [0, 1].
    """

    depth: int
    newly_frozen: tuple[str, ...]
    trained_parameters: int
    frozen_flops_share: float


def freeze(model: nn.Module, stages: Stages, depth: int) -> None:
    """Take the gradient from the stages below `depth` and from what the network never uses."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(stages.stage_of.get(name, -1) >= depth)


def train_mode(
    model: nn.Module, stages: Stages, depth: int, *, freeze_statistics: bool = False
) -> None:
    """Put the network in training mode, its frozen prefix in eval mode.

    Frozen batch norms so keep the source model's statistics to the bit, and frozen dropout is
    off. `freeze_statistics` keeps the statistics of the trained stages' batch norms too.
    """
    model.train()
    for name in stages.eval_modules[depth]:
        model.get_submodule(name).eval()
    for module in model.modules():
        if freeze_statistics and isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def describe_levels(model: nn.Module, stages: Stages) -> list[Level]:
    """Describe the freeze levels, 0 to `MAX_FREEZE_DEPTH`, for a user."""
    levels = []
    before: tuple[str, ...] = ()
    for depth, frozen in enumerate(stages.eval_modules):
        inside = tuple(f"{name}." for name in before)
        newly = []
        for name in frozen:
            parameters = model.get_submodule(name).named_parameters(name)
            if any(not parameter.startswith(inside) for parameter, _ in parameters):
                is_rest = any(earlier.startswith(f"{name}.") for earlier in before)
                newly.append(f"rest of {name}" if is_rest else name)
        trained = sum(stages.sizes[depth : MAX_FREEZE_DEPTH + 1])
        levels.append(Level(depth, tuple(newly), trained, stages.frozen_flops_share(depth)))
        before = frozen
    return levels


def find_stages(model: nn.Module, head: tuple[str, ...], image_size: int) -> Stages:
    """Trace a network on the CPU and divide it into the stages that freeze levels count.

    Raises:
        StagesError: `torch.fx` cannot follow the network, or it has too few cut points.
    """
    try:
        graph = TracedGraph(model, image_size)
    except Exception as err:  # tracing runs the model's own code
        raise StagesError(f"the network cannot be traced by torch.fx: {err}") from err
    uses = graph.parameter_uses(model)
    heads = tuple(f"{name}." for name in head)
    trunk = {name: at for name, at in uses.items() if not name.startswith(heads)}
    end = min(at for name, at in uses.items() if name not in trunk)
    cost = [0, *itertools.accumulate(graph.flops)]
    sizes_at = [0] * len(graph.nodes)
    for name, at in trunk.items():
        sizes_at[at] += model.get_parameter(name).numel()
    weights = list(itertools.accumulate(sizes_at))
    cuts = _choose_cuts(graph, weights, cost, end)
    edges = [cut.position for cut in cuts]
    limits = [-1, *edges, end - 1]
    stage_of = {
        name: sum(at > edge for edge in edges) if name in trunk else MAX_FREEZE_DEPTH
        for name, at in uses.items()
    }
    sizes = [0] * (MAX_FREEZE_DEPTH + 2)
    for name, parameter in model.named_parameters():
        sizes[stage_of.get(name, MAX_FREEZE_DEPTH + 1)] += parameter.numel()
    flops = [cost[high + 1] - cost[low + 1] for low, high in itertools.pairwise(limits)]
    ends = graph.module_ends()
    return Stages(
        stage_of=stage_of,
        eval_modules=tuple(_modules_before(ends, model, limit) for limit in limits),
        flops=(*flops, cost[-1] - cost[end]),
        sizes=tuple(sizes),
        limits=tuple(limits),
        numels=tuple(cut.numel for cut in cuts),
    )


def _modules_before(ends: dict[str, int], model: nn.Module, limit: int) -> tuple[str, ...]:
    """Name the outermost modules all of whose nodes lie at or before `limit`."""
    modules = dict(model.named_modules())
    found: tuple[str, ...] = ()
    for name, last in ends.items():  # a module comes before those in it
        is_inner = name.startswith(tuple(f"{outer}." for outer in found))
        if last <= limit and name in modules and not is_inner:
            found += (name,)
    return found


def _choose_cuts(
    graph: TracedGraph, weights: list[int], cost: list[int], end: int
) -> list[CutPoint]:
    """Choose the cuts between the stages of the trunk, which ends before node `end`.

    Each is the nearest to its share that freezes more than the one before. `weights` are the
    trunk's scalars that are used up to each node, `cost` the FLOPs before it.
    """
    outermost: dict[int, CutPoint] = {}  # of the cuts that freeze the same parameters
    for cut in graph.cut_points(end):
        size = weights[cut.position]
        is_level = 0 < size <= (1 - _LEAST_REST) * weights[-1]
        if is_level and (size not in outermost or cut.nesting <= outermost[size].nesting):
            outermost[size] = cut
    cuts = list(outermost.values())
    if len(cuts) < len(_SHARES):
        raise StagesError(
            f"the network has only {len(cuts)} usable cut points, but {len(_SHARES)} are needed; "
            "choose another backbone."
        )
    shares = np.array([cost[cut.position + 1] / max(1, cost[end]) for cut in cuts])
    nesting = np.array([cut.nesting for cut in cuts])
    chosen: list[int] = []
    for k, share in enumerate(_SHARES):
        first = chosen[-1] + 1 if chosen else 0
        last = len(cuts) - len(_SHARES) + k  # each later level needs a cut of its own
        misfit = np.abs(shares - share) + _NESTING_PENALTY * nesting
        chosen.append(first + int(np.argmin(misfit[first : last + 1])))
    return [cuts[i] for i in chosen]
