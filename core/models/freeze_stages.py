"""Freeze levels of any backbone, from the cut points of its traced graph.

A *cut point* is a place in the graph where exactly one tensor is alive, so that everything before
it is a prefix and everything after it a suffix. The cut before each change of spatial resolution
bounds a stage; where a network has fewer changes than there are levels (a ViT has none after its
patches), its longest stages are divided into equal groups of blocks, and where it has more, its
smallest neighbours are joined. Every backbone so offers the same levels.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from core.config import MAX_FREEZE_DEPTH
from core.models.fx_graph import CutPoint, TracedGraph

# A token more (a class token: 196 -> 197) is no change of resolution; pooling at least halves.
_RESOLUTION_DROP = 0.7
# A last stage of fewer weights than this share of the trunk (ConvNeXt's norm behind the pooling,
# say) is no level of its own. Assumption.
_LEAST_REST = 0.01
# How much of a group's length one level of module nesting is worth when equal groups are sought:
# enough to keep a cut at a block's border, not enough to skip a whole block. Assumption.
_NESTING_PENALTY = 0.25


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
    """

    stage_of: dict[str, int]
    eval_modules: tuple[tuple[str, ...], ...]
    flops: tuple[int, ...]
    sizes: tuple[int, ...]
    limits: tuple[int, ...]

    def frozen_flops_share(self, depth: int) -> float:
        """Return the share of the forward pass that level `depth` freezes, in [0, 1]."""
        return sum(self.flops[:depth]) / max(1, sum(self.flops))


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


def freeze(model: nn.Module, stages: Stages, depth: int) -> list[str]:
    """Freeze the stages below `depth`: no gradient, and eval mode by `train_mode`.

    Parameters that the forward pass never uses are frozen at every level.

    Returns:
        Names of the parameters that stay trainable, in the network's order.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(stages.stage_of.get(name, -1) >= depth)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


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
    edges = [cut.position for cut in _choose_cuts(graph, weights, cost, end)]
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

    `weights` are the trunk's scalars that are used up to each node, `cost` the FLOPs before it.
    """
    cuts = graph.cut_points(end)
    chosen = _distinct(_resolution_cuts(graph, cuts), weights)
    while len(chosen) > MAX_FREEZE_DEPTH - 1:  # join the cheapest neighbours
        edges = [-1, *(cut.position for cut in chosen), end]
        joined = [cost[edges[i + 2]] - cost[edges[i] + 1] for i in range(len(chosen))]
        del chosen[joined.index(min(joined))]
    if len(chosen) < MAX_FREEZE_DEPTH - 1:
        inner = _outermost(cuts, chosen, weights)
        chosen = _distinct(_split_longest(chosen, inner, cost, end), weights)
    if len(chosen) != MAX_FREEZE_DEPTH - 1:
        raise StagesError(
            f"the network has only {len(chosen)} usable cut points, but "
            f"{MAX_FREEZE_DEPTH - 1} are needed; choose another backbone."
        )
    return chosen


def _resolution_cuts(graph: TracedGraph, cuts: list[CutPoint]) -> list[CutPoint]:
    """Pick the cut before each drop of resolution, at the border of the block that drops it.

    Inside such a block (an inverted bottleneck that first widens, say) there may be later cuts
    with wider tensors; so of the borders of all modules that hold the dropping operation, the
    narrowest is taken, and the latest of equals.
    """
    groups: list[list[CutPoint]] = []
    for cut in cuts:
        if groups and cut.spatial > groups[-1][-1].spatial * _RESOLUTION_DROP:
            groups[-1].append(cut)
        else:
            groups.append([cut])
    picked = []
    for group in groups:
        path = graph.paths[group[-1].position + 1]
        starts = {
            next(i for i, other in enumerate(graph.paths) if other[:k] == path[:k])
            for k in range(1, len(path) + 1)
        }
        borders = [cut for cut in group if cut.position + 1 in starts] or [group[-1]]
        picked.append(min(borders, key=lambda cut: (cut.numel, -cut.position)))
    return picked


def _distinct(cuts: Iterable[CutPoint], weights: list[int]) -> list[CutPoint]:
    """Keep cuts that freeze strictly more than the one before, and leave something to train."""
    kept, frozen = [], 0
    for cut in cuts:
        size = weights[cut.position]
        if frozen < size <= (1 - _LEAST_REST) * weights[-1]:
            kept.append(cut)
            frozen = size
    return kept


def _outermost(cuts: list[CutPoint], taken: list[CutPoint], weights: list[int]) -> list[CutPoint]:
    """Keep, of the cuts that freeze the same parameters, the one at the outermost border."""
    frozen_by_taken = {weights[cut.position] for cut in taken}
    best: dict[int, CutPoint] = {}
    for cut in cuts:
        size = weights[cut.position]
        is_new = size not in frozen_by_taken and 0 < size < weights[-1]
        if is_new and (size not in best or cut.nesting <= best[size].nesting):
            best[size] = cut
    return list(best.values())


def _split_longest(
    bounds: list[CutPoint], cuts: list[CutPoint], cost: list[int], end: int
) -> list[CutPoint]:
    """Add cuts until there are as many as levels need: equal groups in the costliest stages."""
    segments = []
    edges = [-1, *(cut.position for cut in bounds), end]
    for low, high in itertools.pairwise(edges):
        inner = [cut for cut in cuts if low < cut.position < high]
        segments.append((cost[low + 1], cost[high] - cost[low + 1], inner))
    pieces = [1] * len(segments)
    while sum(pieces) < MAX_FREEZE_DEPTH:
        open_ = [i for i, (_, _, inner) in enumerate(segments) if len(inner) >= pieces[i]]
        if not open_:
            break
        pieces[max(open_, key=lambda i: segments[i][1] / pieces[i])] += 1
    chosen = set(bounds)
    for (begin, length, left), k in zip(segments, pieces, strict=True):
        for j in range(1, k):
            misfits = [
                abs((cost[cut.position + 1] - begin) / max(1, length) - j / k)
                + _NESTING_PENALTY / k * cut.nesting
                for cut in left
            ]
            best = left[misfits.index(min(misfits))]
            chosen.add(best)
            left = [cut for cut in left if cut.position > best.position] or left
    return sorted(chosen, key=lambda cut: cut.position)
