"""A network cut in two at a freeze level: the frozen prefix, and the suffix that is trained."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from core.config import MAX_FREEZE_DEPTH
from core.models.freeze_stages import Stages, train_mode
from core.models.fx_graph import trace_nodes

Crossing = tuple[Any, ...]
"""What crosses the cut: the one tensor alive there, (N, ...), and numbers taken from shapes."""


class Half(nn.Module):
    """Part of a network's forward pass, on the network's own modules and parameters.

    Attributes:
        graph: What it does, by the names of the network's modules.
        parts: The modules that it calls; a change of mode reaches these alone.
    """

    def __init__(self, network: nn.Module, cut: "_Cut") -> None:
        super().__init__()
        self.graph = cut.graph
        called = (str(node.target) for node in cut.graph.nodes if node.op == "call_module")
        self.parts = nn.ModuleList(map(network.get_submodule, dict.fromkeys(called)))
        # Not as a child: most of the network belongs to the other half.
        self._run = functools.partial(cut.run, network)

    def forward(self, *values: Any) -> Any:
        """Run the half."""
        return self._run(*values)


class Suffix(nn.Module):
    """The half behind the cut, as a network whose input is what crosses."""

    def __init__(self, half: Half) -> None:
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

    prefix: Half
    train_suffix: Suffix
    eval_suffix: Suffix


@dataclass(frozen=True, slots=True)
class _Cut:
    """One half of a traced network, for any network of the same build.

    Attributes:
        graph: Its graph, which holds names only.
        run: Its code: takes the network, then the graph's inputs.
    """

    graph: fx.Graph
    run: Callable[..., Any]


_Plan = tuple[_Cut, _Cut, _Cut]
"""Prefix, suffix in training, suffix in evaluation."""


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
    key = (depth, freeze_statistics)
    plan = stages.plans[key] if key in stages.plans else _trace_plan(model, stages, *key)
    model.eval()
    if plan is None:
        return None
    prefix, train_suffix, eval_suffix = (Half(model, cut) for cut in plan)
    return Halves(prefix, Suffix(train_suffix), Suffix(eval_suffix))


def _trace_plan(
    model: nn.Module, stages: Stages, depth: int, freeze_statistics: bool
) -> _Plan | None:
    """Trace a network in both modes, and keep what was found with its stages."""
    # In both, since a function such as dropout is traced with its mode.
    train_mode(model, stages, depth, freeze_statistics=freeze_statistics)
    prefix, train_suffix = _halves(model, stages.limits[depth])
    model.eval()
    eval_prefix, eval_suffix = _halves(model, stages.limits[depth])
    plan = None
    if str(prefix) == str(eval_prefix):
        cuts = [_compile(model, half) for half in (prefix, train_suffix, eval_suffix)]
        plan = (cuts[0], cuts[1], cuts[2])
    if all(_is_of_any(model, half) for half in (prefix, train_suffix, eval_suffix)):
        stages.plans[depth, freeze_statistics] = plan
    return plan


def _halves(model: nn.Module, position: int) -> tuple[fx.Graph, fx.Graph]:
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
    return first, second


def _compile(model: nn.Module, graph: fx.Graph) -> _Cut:
    """Turn a graph into code that runs on any network with the modules it names."""
    run = type(fx.GraphModule(model, graph)).forward
    graph.owning_module = None  # it would keep this one network in memory
    return _Cut(graph, run)


def _is_of_any(model: nn.Module, graph: fx.Graph) -> bool:
    """Say whether a graph holds for every network of this build.

    Not where tracing computed a tensor and left it on this one as a constant.
    """
    own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    own |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
    return all(str(node.target) in own for node in graph.nodes if node.op == "get_attr")


def crossing_bytes(crossing: Crossing) -> int:
    """Return the memory that a crossing takes."""
    tensors = [value for value in crossing if isinstance(value, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
