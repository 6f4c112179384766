"""Freeze levels of any backbone, from the cut points of its traced graph.

A *cut point* is a place in the graph where exactly one tensor is alive, so that everything before
it is a prefix and everything after it a suffix. The cut before each change of spatial resolution
bounds a stage; where a network has fewer changes than there are levels (a ViT has none after its
patches), its longest stages are divided into equal groups of blocks, and where it has more, its
smallest neighbours are joined. Every backbone so offers the same levels.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from core.config import MAX_FREEZE_DEPTH
from core.traced import Cut, Traced

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
        flops: Forward FLOPs of one picture in each stage, the head's last.
        sizes: Parameters (scalars) in each stage, the head's last, then those never used.
        limits: For each level, the last node of the traced graph that it freezes; -1 for none.
        plans: What `core.split` worked out for these stages, to be found again.
    """

    stage_of: dict[str, int]
    eval_modules: tuple[tuple[str, ...], ...]
    flops: tuple[int, ...]
    sizes: tuple[int, ...]
    limits: tuple[int, ...] = ()
    plans: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    def frozen_flops_share(self, depth: int) -> float:
        """Return the share of the forward pass that level `depth` freezes, in [0, 1]."""
        return sum(self.flops[:depth]) / max(1, sum(self.flops))


class _Weights:
    """How many scalars of the trunk have been used up to a node."""

    def __init__(self, model: nn.Module, uses: dict[str, int]) -> None:
        sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        self._uses = [(at, sizes[name]) for name, at in uses.items()]
        self.total = sum(size for _, size in self._uses)

    def before(self, position: int) -> int:
        return sum(size for at, size in self._uses if at <= position)


def _resolution_cuts(traced: Traced, cuts: list[Cut]) -> list[Cut]:
    """Pick the cut before each drop of resolution, at the border of the block that drops it.

    Inside such a block (an inverted bottleneck that first widens, say) there may be later cuts
    with wider tensors; so of the borders of all modules that hold the dropping operation, the
    narrowest is taken, and the latest of equals.
    """
    groups: list[list[Cut]] = []
    for cut in cuts:
        if groups and cut.spatial > groups[-1][-1].spatial * _RESOLUTION_DROP:
            groups[-1].append(cut)
        else:
            groups.append([cut])
    picked = []
    for group in groups:
        at = {cut.position: cut for cut in group}
        path = traced.paths[group[-1].position + 1]
        starts = {_start(traced.paths, path[:k]) for k in range(1, len(path) + 1)}
        borders = [at[start - 1] for start in starts if start - 1 in at] or [group[-1]]
        picked.append(min(borders, key=lambda cut: (cut.numel, -cut.position)))
    return picked


def _start(paths: list[list[str]], prefix: list[str]) -> int:
    return next(i for i, path in enumerate(paths) if path[: len(prefix)] == prefix)


def _distinct(cuts: Iterable[Cut], weights: _Weights) -> list[Cut]:
    """Keep cuts that freeze strictly more than the one before, and leave something to train."""
    kept, frozen = [], 0
    for cut in cuts:
        size = weights.before(cut.position)
        if frozen < size <= (1 - _LEAST_REST) * weights.total:
            kept.append(cut)
            frozen = size
    return kept


def _join_smallest(bounds: list[Cut], cost: list[int], end: int) -> list[Cut]:
    """Drop cuts until there are as many as levels need, joining the cheapest neighbours."""
    bounds = list(bounds)
    while len(bounds) > MAX_FREEZE_DEPTH - 1:
        edges = [-1, *(cut.position for cut in bounds), end]
        joined = [cost[edges[i + 2]] - cost[edges[i] + 1] for i in range(len(bounds))]
        del bounds[joined.index(min(joined))]
    return bounds


def _split_longest(bounds: list[Cut], cuts: list[Cut], cost: list[int], end: int) -> list[Cut]:
    """Add cuts until there are as many as levels need: equal groups in the costliest stages."""
    edges = [-1, *(cut.position for cut in bounds), end]
    segments = []
    for low, high in itertools.pairwise(edges):
        inner = [cut for cut in cuts if low < cut.position < high]
        segments.append((cost[low + 1], cost[high] - cost[low + 1], inner))
    pieces = [1] * len(segments)
    while sum(pieces) < MAX_FREEZE_DEPTH:
        open_ = [i for i, (_, _, inner) in enumerate(segments) if len(inner) >= pieces[i]]
        if not open_:
            break
        pieces[max(open_, key=lambda i: segments[i][1] / pieces[i])] += 1
    result = list(bounds)
    for (begin, length, inner), k in zip(segments, pieces, strict=True):
        left = list(inner)
        for j in range(1, k):
            best = min(left, key=lambda cut: _misfit(cut, begin, length, j / k, k, cost))
            result.append(best)
            left = [cut for cut in left if cut.position > best.position] or left
    return sorted(set(result), key=lambda cut: cut.position)


def _misfit(cut: Cut, begin: int, length: int, target: float, k: int, cost: list[int]) -> float:
    share = (cost[cut.position + 1] - begin) / max(1, length)
    return abs(share - target) + _NESTING_PENALTY / k * cut.nesting


def find_stages(model: nn.Module, head: tuple[str, ...], image_size: int) -> Stages:
    """Trace a network and divide it into the stages that freeze levels count.

    Args:
        model: Network with its new head, on the CPU.
        head: Names of the head's modules.
        image_size: Side of the input, pixels.

    Raises:
        StagesError: `torch.fx` cannot follow the network, or it has too few cut points.
    """
    try:
        traced = Traced(model, image_size)
    except Exception as err:  # tracing runs the model's own code
        raise StagesError(f"the network cannot be traced by torch.fx: {err}") from err
    uses = traced.parameter_uses(model)
    in_head = {name for name in uses if any(name.startswith(f"{h}.") for h in head)}
    end = min(uses[name] for name in in_head)
    trunk = {name: at for name, at in uses.items() if name not in in_head}
    cost = [0, *itertools.accumulate(traced.flops)]
    cuts = traced.cuts(end)
    weights = _Weights(model, trunk)
    bounds = _distinct(_resolution_cuts(traced, cuts), weights)
    bounds = _join_smallest(bounds, cost, end)
    if len(bounds) < MAX_FREEZE_DEPTH - 1:
        usable = _outermost(cuts, bounds, weights)
        bounds = _distinct(_split_longest(bounds, usable, cost, end), weights)
    if len(bounds) != MAX_FREEZE_DEPTH - 1:
        raise StagesError(
            f"the network has only {len(bounds)} usable cut points, but "
            f"{MAX_FREEZE_DEPTH - 1} are needed; choose another backbone."
        )
    edges = [cut.position for cut in bounds]
    stage_of = {
        name: sum(at > edge for edge in edges) if name in trunk else MAX_FREEZE_DEPTH
        for name, at in uses.items()
    }
    limits = [-1, *edges, end - 1]
    flops = [cost[high + 1] - cost[low + 1] for low, high in itertools.pairwise(limits)]
    flops.append(cost[-1] - cost[end])
    eval_modules = tuple(_modules_before(traced, model, limit) for limit in limits)
    sizes = _sizes(model, stage_of)
    return Stages(stage_of, eval_modules, tuple(flops), sizes, tuple(limits))


def _sizes(model: nn.Module, stage_of: dict[str, int]) -> tuple[int, ...]:
    unused = MAX_FREEZE_DEPTH + 1
    counts: Counter[int] = Counter()
    for name, parameter in model.named_parameters():
        counts[stage_of.get(name, unused)] += parameter.numel()
    return tuple(counts[stage] for stage in range(unused + 1))


def _outermost(cuts: list[Cut], taken: list[Cut], weights: _Weights) -> list[Cut]:
    """Keep, of the cuts that freeze the same parameters, the one at the outermost border."""
    frozen_by_taken = {weights.before(cut.position) for cut in taken}
    best: dict[int, Cut] = {}
    for cut in cuts:
        size = weights.before(cut.position)
        is_new = size not in frozen_by_taken and 0 < size < weights.total
        if is_new and (size not in best or cut.nesting <= best[size].nesting):
            best[size] = cut
    return list(best.values())


def _modules_before(traced: Traced, model: nn.Module, limit: int) -> tuple[str, ...]:
    """Name the outermost modules all of whose nodes lie at or before `limit`."""
    first_to_last: dict[str, int] = {}
    for i, (node, path) in enumerate(zip(traced.nodes, traced.paths, strict=True)):
        if node.op in ("placeholder", "output"):
            continue
        depth = len(path) if node.op == "call_module" else len(path) - 1
        for k in range(1, depth + 1):
            first_to_last[".".join(path[:k])] = i
    modules = dict(model.named_modules())
    inside = {name for name, last in first_to_last.items() if last <= limit and name in modules}
    return tuple(
        name
        for name in first_to_last
        if name in inside and not any(parent in inside for parent in _parents(name))
    )


def _parents(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[:k]) for k in range(1, len(parts)))


def freeze(model: nn.Module, stages: Stages, depth: int) -> list[str]:
    """Freeze the stages below `depth`: no gradient, and eval mode by `train_mode`.

    Parameters that the forward pass never uses are frozen at every level.

    Returns:
        Names of the parameters that stay trainable, in the network's order.
    """
    trainable = []
    for name, parameter in model.named_parameters():
        is_trained = stages.stage_of.get(name, -1) >= depth
        parameter.requires_grad_(is_trained)
        if is_trained:
            trainable.append(name)
    return trainable


def train_mode(
    model: nn.Module, stages: Stages, depth: int, *, freeze_statistics: bool = False
) -> None:
    """Put the network in training mode, its frozen prefix in eval mode.

    To be called wherever `model.train()` would be: a frozen batch norm so keeps the source
    model's statistics to the bit, and frozen dropout is off.

    Args:
        model: The network.
        stages: Its freeze levels.
        depth: The level.
        freeze_statistics: Keep the statistics of batch norms in trained stages too.
    """
    model.train()
    for name in stages.eval_modules[depth]:
        model.get_submodule(name).eval()
    if freeze_statistics:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
