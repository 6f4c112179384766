"""A network cut at a freeze level: the frozen prefix, and the part behind it that is trained."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.functional import linear

from core.config import MAX_FREEZE_DEPTH, TrainConfig
from core.models.builder import Network
from core.models.freeze_stages import freeze_batch_norms, train_mode
from core.models.fx_graph import trace_nodes
from core.models.sources import BackboneError

# Numbers beside the tensor must be the same for both, or they depend on the batch.
_PROBE_BATCHES = (2, 3)


@dataclass(frozen=True, slots=True)
class Trainable:
    """What is trained of a network: all of it, or what lies behind a cut.

    Attributes:
        module: The network's own layers, under their own names.
        set_train_mode: Puts the module in training mode, but for what is frozen.
        to_evaluate: Gives what a copy of the module does in evaluation, where that is traced
            apart.
    """

    module: nn.Module
    set_train_mode: Callable[[], None]
    to_evaluate: Callable[[nn.Module], nn.Module]


@dataclass(frozen=True, slots=True)
class Partition:
    """A network cut at a freeze level.

    Attributes:
        make_prefix: Gives the frozen part, in eval mode: images (N, 3, S, S) to rows (N, ...).
        suffix: What is trained: rows to logits, (N, K).
        row_shape: Shape of one row.
        is_linear: Whether the suffix is one linear layer and nothing else.
    """

    make_prefix: Callable[[], nn.Module]
    suffix: Trainable
    row_shape: tuple[int, ...]
    is_linear: bool


@dataclass(frozen=True, slots=True)
class _Plan:
    """Where a network is cut: graphs that hold names only, for any network of the build."""

    prefix: fx.Graph
    train_suffix: fx.Graph
    eval_suffix: fx.Graph
    row_shape: tuple[int, ...]


_PLANS: dict[Hashable, _Plan | None] = {}


def _keeps_statistics(config: TrainConfig, network: Network) -> bool:
    """Say whether the batch norms of trained layers keep the source's statistics."""
    is_pretrained = network.weights != "none"
    return config.batch_norm == "frozen" or (config.batch_norm == "auto" and is_pretrained)


def whole(network: Network, config: TrainConfig) -> Trainable:
    """Return the whole network as what is trained; its frozen stages stay in eval mode."""
    model, stages, keeps = network.model, network.stages, _keeps_statistics(config, network)

    def set_train_mode() -> None:
        train_mode(model, stages, config.freeze_depth, freeze_statistics=keeps)

    return Trainable(model, set_train_mode, lambda module: module)


def cut(network: Network, config: TrainConfig) -> Partition | None:
    """Cut a network at the configuration's freeze level, 1 or more.

    Both parts hold the network's own layers, and together do exactly what it does.

    Returns:
        None where rows could not be kept: the frozen part differs between training and
        evaluation, or hands over more than one tensor, or a number that depends on the batch.
    """
    model, depth = network.model, config.freeze_depth
    size = network.preprocessing.image_size
    limit, keeps = network.stages.limits[depth], _keeps_statistics(config, network)
    key = (config.backbone, size, network.weights == "none", depth, keeps)
    if key in _PLANS:
        plan = _PLANS[key]
    else:
        # In both modes, since a function such as dropout is traced with its mode.
        train_mode(model, network.stages, depth, freeze_statistics=keeps)
        trained = trace_nodes(model)
        model.eval()
        plan = _plan(model, trained, trace_nodes(model), limit, size)
        # A tensor that tracing computed is a constant of this one network.
        graphs = (plan.prefix, plan.train_suffix, plan.eval_suffix) if plan else ()
        names = [str(node.target) for graph in graphs for node in graph.nodes]
        if not any(name.startswith("_tensor_constant") for name in names):
            _PLANS[key] = plan
    model.eval()
    if plan is None:
        return None
    module = fx.GraphModule(model, plan.train_suffix)

    def set_train_mode() -> None:
        module.train()
        if keeps:
            freeze_batch_norms(module)

    own = ("placeholder", "get_attr", "output")
    behind = [node.target for node in plan.eval_suffix.nodes if node.op not in own]
    # timm's own linear layers are traced as calls of the function.
    is_linear = behind in ([network.head[0]], [linear]) and isinstance(
        model.get_submodule(network.head[0]), nn.Linear
    )
    return Partition(
        lambda: fx.GraphModule(model, plan.prefix).eval(),
        Trainable(module, set_train_mode, lambda kept: fx.GraphModule(kept, plan.eval_suffix)),
        plan.row_shape,
        is_linear,
    )


def cut_head(network: Network, config: TrainConfig) -> Partition:
    """Cut a network before its head, which is to be solved.

    Raises:
        BackboneError: The head is not one linear layer.
    """
    part = cut(network, replace(config, freeze_depth=MAX_FREEZE_DEPTH))
    if part is None or not part.is_linear:
        remedy = "train.head_solver=sgd"
        if config.head_init == "solved":
            remedy += " --set train.head_init=default"
        raise BackboneError(
            "train.backbone must have a head of one linear layer where the head is solved, but "
            f"got backbone={config.backbone!r}. Train it by steps (--set {remedy})."
        )
    return part


def _plan(
    model: nn.Module,
    train_nodes: list[fx.Node],
    eval_nodes: list[fx.Node],
    limit: int,
    image_size: int,
) -> _Plan | None:
    prefix, crossing = _before(eval_nodes, limit)
    before_training, crossing_training = _before(train_nodes, limit)
    if str(before_training) != str(prefix):
        return None
    values = _crossing_values(fx.GraphModule(model, prefix), image_size)
    if values is None:
        return None
    at = next(k for k, value in enumerate(values) if isinstance(value, Tensor))
    # The one output is the tensor; the rest is written into the suffix.
    output = next(node for node in prefix.nodes if node.op == "output")
    output.args = (output.args[0][at],)
    train_suffix, eval_suffix = (
        _behind(nodes, limit, dict(zip(sources, values, strict=True)), sources[at])
        for nodes, sources in ((train_nodes, crossing_training), (eval_nodes, crossing))
    )
    return _Plan(prefix, train_suffix, eval_suffix, tuple(values[at].shape[1:]))


def _before(nodes: list[fx.Node], limit: int) -> tuple[fx.Graph, list[fx.Node]]:
    """Copy what lies before the cut; its outputs are the values, listed, that are used behind."""
    used = {source for node in nodes[limit + 1 :] for source in node.all_input_nodes}
    # A suffix reads parameters itself.
    crossing = [n for n in nodes[: limit + 1] if n in used and n.op != "get_attr"]
    graph = fx.Graph()
    kept: dict[fx.Node, fx.Node] = {}
    for node in nodes[: limit + 1]:
        kept[node] = graph.node_copy(node, kept.__getitem__)
    graph.output(tuple(kept[node] for node in crossing))
    return graph, crossing


def _behind(
    nodes: list[fx.Node], limit: int, values: dict[fx.Node, Any], tensor: fx.Node
) -> fx.Graph:
    """Copy what lies behind the cut; its one input is the tensor that crosses."""
    graph = fx.Graph()
    kept = {**values, tensor: graph.placeholder("rows")}
    used = {source for node in nodes[limit + 1 :] for source in node.all_input_nodes}
    parameters = [node for node in nodes[: limit + 1] if node in used and node not in values]
    for node in (*parameters, *nodes[limit + 1 :]):
        kept[node] = graph.node_copy(node, kept.__getitem__)
    return graph


def _crossing_values(prefix: fx.GraphModule, image_size: int) -> list[Any] | None:
    """Run a prefix on two batches; return what crosses, or None where it cannot be kept."""
    like = next(prefix.parameters())
    found, rest = [], []
    for n in _PROBE_BATCHES:
        with torch.no_grad():
            values = list(prefix(like.new_zeros(n, 3, image_size, image_size)))
        tensors = [value for value in values if isinstance(value, Tensor)]
        if len(tensors) != 1 or tensors[0].ndim < 2 or len(tensors[0]) != n:
            return None
        found.append(values)
        rest.append([value for value in values if not isinstance(value, Tensor)])
    return found[0] if rest[0] == rest[1] else None
