"""The middle of a network: from what crosses one freeze level to what crosses a deeper one."""

from typing import Any

from torch import fx, nn

from core.models.freeze_stages import Stages
from core.split import Half, _compile, _Cut, _is_of_any


def middle(network: nn.Module, prefix: Half, stages: Stages, low: int, high: int) -> Half | None:
    """Return the frozen layers between two levels.

    They are the deeper prefix's own nodes behind the shallower cut, so from equal inputs they
    compute what the prefix computes, bit by bit. What crosses the shallower cut must come from a
    run whose suffix did not write into it: the nodes behind that cut are the same here.

    Args:
        network: The whole network.
        prefix: Its frozen half at level `high`.
        stages: Its freeze levels.
        low: The shallower level, 1 or more.
        high: The deeper level.

    Returns:
        None where the prefix's graph is not the traced one, node by node.
    """
    key = ("middle", low, high)
    if key not in stages.plans:
        nodes = [node for node in prefix.graph.nodes if node.op != "output"]
        if len(nodes) != stages.limits[high] + 1:
            return None
        graph = _behind(prefix.graph, stages.limits[low])
        cut = _compile(network, graph)
        if not _is_of_any(network, graph):
            return Half(network, cut)
        stages.plans[key] = cut
    cut = stages.plans[key]
    assert isinstance(cut, _Cut), "plans under this key are ours"
    return Half(network, cut)


def _behind(graph: fx.Graph, position: int) -> fx.Graph:
    """Copy the nodes behind a position; what crosses it becomes the inputs, in the same order."""
    nodes = list(graph.nodes)
    before, after = nodes[: position + 1], nodes[position + 1 :]
    taken = {source for node in after for source in node.all_input_nodes}
    crossing = [node for node in before if node in taken and node.op != "get_attr"]
    constants = [node for node in before if node in taken and node.op == "get_attr"]
    found = fx.Graph()
    kept: dict[fx.Node, Any] = {
        node: found.placeholder(f"crossing_{k}") for k, node in enumerate(crossing)
    }
    for node in (*constants, *after):
        kept[node] = found.node_copy(node, kept.__getitem__)
    return found
