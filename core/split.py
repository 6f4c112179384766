"""A network cut in two at a freeze level: the frozen prefix, and the suffix that is trained."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from core.config import MAX_FREEZE_DEPTH
from core.stages import Stages, trace_nodes, train_mode

Crossing = tuple[Any, ...]
"""What crosses the cut: the one tensor alive there, (N, ...), and numbers taken from shapes."""


class Suffix(nn.Module):
    """The half behind the cut, as a network whose input is what crosses."""

    def __init__(self, half: fx.GraphModule) -> None:
        super().__init__()
        self.graph_module = half

    def forward(self, crossing: Crossing) -> Tensor:
        """Return logits, (N, K)."""
        logits: Tensor = self.graph_module(*crossing)
        return logits


@dataclass(frozen=True, slots=True)
class Halves:
    """The two halves of a network; both hold the network's own modules and parameters.

    Attributes:
        prefix: Pictures, (N, 3, S, S), to what crosses the cut; in eval mode at all times.
        train_suffix: What crosses to logits, (N, K), as the network is while it trains.
        eval_suffix: The same as it is while it is evaluated.
    """

    prefix: fx.GraphModule
    train_suffix: Suffix
    eval_suffix: Suffix


def split_network(
    model: nn.Module, stages: Stages, depth: int, *, freeze_statistics: bool
) -> Halves | None:
    """Cut a network at a freeze level; together the halves do exactly what it does.

    Args:
        model: The network.
        stages: Its freeze levels.
        depth: The level, 1 to `MAX_FREEZE_DEPTH`.
        freeze_statistics: Keep the statistics of batch norms in trained stages too.

    Returns:
        None where the part before the cut is not the same in training and in evaluation, so that
        its outputs could not be kept.

    Raises:
        ValueError: Level 0 has no prefix.
    """
    if not 1 <= depth <= MAX_FREEZE_DEPTH:
        raise ValueError(f"depth must be 1 to {MAX_FREEZE_DEPTH} to be cut at, but got {depth=}.")
    # Traced in both modes, since a function such as dropout is traced with its mode.
    train_mode(model, stages, depth, freeze_statistics=freeze_statistics)
    prefix, train_suffix = _halves(model, stages.limits[depth])
    model.eval()
    eval_prefix, eval_suffix = _halves(model, stages.limits[depth])
    if str(prefix.graph) != str(eval_prefix.graph):
        return None
    return Halves(prefix, Suffix(train_suffix), Suffix(eval_suffix))


def _halves(model: nn.Module, position: int) -> tuple[fx.GraphModule, fx.GraphModule]:
    nodes = trace_nodes(model)
    before, after = nodes[: position + 1], nodes[position + 1 :]
    taken = {source for node in after for source in node.all_input_nodes}
    # Parameters are not handed over: each half takes its own from the network.
    crossing = [node for node in before if node in taken and node.op != "get_attr"]
    constants = [node for node in before if node in taken and node.op == "get_attr"]
    first, second = fx.Graph(), fx.Graph()
    kept: dict[fx.Node, fx.Node] = {}
    for node in before:
        kept[node] = first.node_copy(node, kept.__getitem__)
    first.output(tuple(kept[node] for node in crossing))
    kept = {node: second.placeholder(f"crossing_{k}") for k, node in enumerate(crossing)}
    for node in constants:
        kept[node] = second.node_copy(node, kept.__getitem__)
    for node in after:
        kept[node] = second.node_copy(node, kept.__getitem__)
    return fx.GraphModule(model, first), fx.GraphModule(model, second)


def crossing_bytes(crossing: Crossing) -> int:
    """Return the memory that a crossing takes."""
    tensors = [value for value in crossing if isinstance(value, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
