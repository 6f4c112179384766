"""A network cut at a freeze level: the frozen prefix, and the part behind it that is trained."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.functional import linear

from core.config import MAX_FREEZE_DEPTH, TrainConfig
from core.models.builder import Network
from core.models.freeze_stages import train_mode
from core.models.fx_graph import trace_nodes
from core.models.sources import BackboneError


@dataclass(frozen=True, slots=True)
class Trainable:
    """What is trained of a network: all of it, or what lies behind a cut.

    Attributes:
        module: The network's own layers, under their own names.
        set_train_mode: Puts the network in training mode, but for what is frozen.
        to_evaluate: Gives what a copy of the module does in evaluation.
    """

    module: nn.Module
    set_train_mode: Callable[[], None]
    to_evaluate: Callable[[nn.Module], nn.Module]


MakePrefix = Callable[[], fx.GraphModule]
"""Gives the frozen part of a network, in eval mode: images (N, 3, S, S) to rows (N, ...)."""

# The prefix, and what lies behind it in training and in evaluation: graphs that hold names only,
# for any network of the build.
_Plan = tuple[fx.Graph, fx.Graph, fx.Graph]
_PLANS: dict[Hashable, _Plan | None] = {}


def whole(network: Network, config: TrainConfig) -> Trainable:
    """Return the whole network as what is trained; its frozen stages stay in eval mode."""
    kind = "train" if network.weights == "none" else "frozen"
    is_frozen = (kind if config.batch_norm == "auto" else config.batch_norm) == "frozen"

    def set_train_mode() -> None:
        depth = config.freeze_depth
        train_mode(network.model, network.stages, depth, freeze_statistics=is_frozen)

    return Trainable(network.model, set_train_mode, lambda module: module)


def cut(network: Network, config: TrainConfig) -> tuple[MakePrefix, Trainable] | None:
    """Cut a network at the configuration's freeze level, 1 or more.

    Both parts hold the network's own layers, and together do exactly what it does.

    Returns:
        What makes the frozen part, and the rest: rows to logits, (N, K). None where rows could
        not be kept: the frozen part differs between training and evaluation, or hands over more
        than one tensor, or a number that depends on the batch.
    """
    model, depth, size = network.model, config.freeze_depth, network.preprocessing.image_size
    set_train_mode = whole(network, config).set_train_mode
    key = (config.backbone, size, network.weights == "none", depth, config.batch_norm)
    if key in _PLANS:
        plan = _PLANS[key]
    else:
        # In both modes, since a function such as dropout is traced with its mode.
        set_train_mode()
        trained = trace_nodes(model)
        model.eval()
        plan = _plan(model, trained, trace_nodes(model), network.stages.limits[depth], size)
        # A tensor that tracing computed is a constant of this one network.
        names = [str(node.target) for graph in plan or () for node in graph.nodes]
        if not any(name.startswith("_tensor_constant") for name in names):
            _PLANS[key] = plan
    model.eval()
    if plan is None:
        return None
    prefix, train_suffix, eval_suffix = plan
    suffix = Trainable(
        fx.GraphModule(model, train_suffix),
        set_train_mode,
        lambda kept: fx.GraphModule(kept, eval_suffix),
    )
    return lambda: fx.GraphModule(model, prefix).eval(), suffix


def check_head(network: Network, config: TrainConfig) -> None:
    """Raise `BackboneError` where a network's head is not one linear layer."""
    parts = cut(network, replace(config, freeze_depth=MAX_FREEZE_DEPTH))
    if parts is None or not _is_linear(parts[1], network):
        remedy = "train.head_solver=sgd"
        if config.head_init == "solved":
            remedy += " --set train.head_init=default"
        raise BackboneError(
            "train.backbone must have a head of one linear layer with a bias where the head is "
            f"solved, but got backbone={config.backbone!r}. Train it by steps (--set {remedy})."
        )


def _is_linear(suffix: Trainable, network: Network) -> bool:
    """Say whether all that a suffix computes is one linear layer."""
    evaluated, head = suffix.to_evaluate(suffix.module), network.head[0]
    assert isinstance(evaluated, fx.GraphModule)
    own = ("placeholder", "get_attr", "output")
    targets = [node.target for node in evaluated.graph.nodes if node.op not in own]
    # timm's own linear layers are traced as calls of the function.
    is_call = targets in ([head], [linear])
    layer = network.model.get_submodule(head)
    return is_call and isinstance(layer, nn.Linear) and layer.bias is not None


def _plan(
    model: nn.Module, trained: list[fx.Node], evaluated: list[fx.Node], limit: int, size: int
) -> _Plan | None:
    prefix, outputs = _before(evaluated, limit)
    before_training, train_outputs = _before(trained, limit)
    if str(before_training) != str(prefix):
        return None
    run = fx.GraphModule(model, prefix)
    images = next(model.parameters()).new_zeros(3, 3, size, size)
    with torch.no_grad():
        two, three = list(run(images[:2])), list(run(images))
    found = [k for k, value in enumerate(two) if isinstance(value, Tensor)]
    if len(found) != 1 or not all(k in found or two[k] == three[k] for k in range(len(two))):
        return None  # several tensors, or numbers that depend on the batch
    at = found[0]
    if two[at].ndim < 2 or (len(two[at]), len(three[at])) != (2, 3):
        return None
    # The one output is the tensor; the rest is written into the suffix.
    output = next(node for node in prefix.nodes if node.op == "output")
    output.args = (output.args[0][at],)
    train_suffix, eval_suffix = (
        _behind(nodes, limit, dict(zip(sources, two, strict=True)), sources[at])
        for nodes, sources in ((trained, train_outputs), (evaluated, outputs))
    )
    return prefix, train_suffix, eval_suffix


def _before(nodes: list[fx.Node], limit: int) -> tuple[fx.Graph, list[fx.Node]]:
    """Copy what lies before the cut; its outputs are the values, listed, that are used behind."""
    behind = set(nodes[limit + 1 :])
    # A suffix reads parameters itself.
    outputs = [n for n in nodes[: limit + 1] if n.op != "get_attr" and behind & n.users.keys()]
    graph = fx.Graph()
    kept: dict[fx.Node, fx.Node] = {}
    for node in nodes[: limit + 1]:
        kept[node] = graph.node_copy(node, kept.__getitem__)
    graph.output(tuple(kept[node] for node in outputs))
    return graph, outputs


def _behind(
    nodes: list[fx.Node], limit: int, values: dict[fx.Node, Any], tensor: fx.Node
) -> fx.Graph:
    """Copy what lies behind the cut; its one input is the tensor that crosses."""
    graph = fx.Graph()
    kept = {**values, tensor: graph.placeholder("rows")}
    behind = set(nodes[limit + 1 :])
    for node in nodes:
        if node in behind or (node.op == "get_attr" and behind & node.users.keys()):
            kept[node] = graph.node_copy(node, kept.__getitem__)
    return graph
