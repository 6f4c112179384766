"""A network's graph as torch.fx follows it: what each node costs, and where it can be cut."""

import functools
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import NodePathTracer

# Three, since hardly any network has a dimension of three behind its first layer: a tensor whose
# first dimension is not three (windows of a Swin block, say) no longer holds one row a picture.
_PROBE_BATCH = 3


@dataclass(frozen=True, slots=True)
class Cut:
    """A place between two nodes where one tensor is alive.

    Attributes:
        position: Index of the last node before the cut.
        spatial: Positions per picture of the tensor: height times width, or tokens.
        numel: Elements of the tensor.
        nesting: Modules that hold both neighbours; small at the border of a large block.
    """

    position: int
    spatial: int
    numel: int
    nesting: int


class _Measure(fx.Interpreter):
    """Runs the graph once and notes each node's FLOPs and the shape of its tensor."""

    def __init__(self, module: fx.GraphModule, counter: FlopCounterMode) -> None:
        super().__init__(module)
        self.counter = counter
        self.flops: list[int] = []
        self.values: list[Any] = []

    def run_node(self, n: fx.Node) -> Any:
        before = self.counter.get_total_flops()
        value = super().run_node(n)
        self.flops.append(self.counter.get_total_flops() - before)
        self.values.append(_shape(value))
        return value


def _shape(value: Any) -> Any:
    """Reduce a node's value to a tensor's shape, `...` for a container of tensors, or None."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape) if value.is_floating_point() else ...
    if isinstance(value, (tuple, list)) and any(isinstance(v, torch.Tensor) for v in value):
        return ...
    return None


class Traced:
    """A network's graph with what each node is called, uses, and costs.

    Attributes:
        nodes: Of the graph, in its order.
        paths: For each node the modules that it lies in, from the outermost.
        flops: Forward FLOPs of one picture, by node.
        shapes: Of each node's tensor; `...` where it is more than one, None where it is none.
        index: Place of each node in the list.
    """

    def __init__(self, model: nn.Module, image_size: int) -> None:
        """Trace a network in eval mode and run it once.

        Args:
            model: Network, on the CPU; its mode is left as it was.
            image_size: Side of the input, pixels.
        """
        tracer = _tracer()
        was_training = model.training
        model.eval()
        try:
            graph = tracer.trace(model)
            images = torch.zeros(_PROBE_BATCH, 3, image_size, image_size)
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                measure = _Measure(fx.GraphModule(model, graph), counter)
                measure.run(images)
        finally:
            model.train(was_training)
        self.nodes = list(graph.nodes)
        self.paths = [tracer.node_to_qualname.get(node, "").split(".") for node in self.nodes]
        self.flops = [flops // _PROBE_BATCH for flops in measure.flops]
        self.shapes = measure.values
        self.index = {node: i for i, node in enumerate(self.nodes)}

    def last_use(self, i: int) -> int:
        """Return the last node that uses what a node gives."""
        return max((self.index[user] for user in self.nodes[i].users), default=i)

    def parameter_uses(self, model: nn.Module) -> dict[str, int]:
        """Map each used parameter to the last node that uses it."""
        names = {id(p): name for name, p in model.named_parameters()}
        uses: dict[str, int] = {}
        for i, node in enumerate(self.nodes):
            if node.op == "call_module":
                found: Iterable[nn.Parameter] = model.get_submodule(str(node.target)).parameters()
                at = i
            elif node.op == "get_attr":
                value = functools.reduce(getattr, str(node.target).split("."), model)
                found = [value] if isinstance(value, nn.Parameter) else []
                at = self.last_use(i)
            else:
                continue
            for parameter in found:
                name = names[id(parameter)]
                uses[name] = max(uses.get(name, 0), at)
        return uses

    def cuts(self, end: int) -> list[Cut]:
        """Return the cut points before node `end`, in the graph's order."""
        alive_until = [
            self.last_use(i) if self.shapes[i] is not None and node.op != "get_attr" else -1
            for i, node in enumerate(self.nodes)
        ]
        cuts = []
        alive: set[int] = set()
        for i in range(end):
            if alive_until[i] > i:
                alive.add(i)
            alive = {j for j in alive if alive_until[j] > i}
            if len(alive) != 1:
                continue
            shape = self.shapes[next(iter(alive))]
            if shape is ... or shape[0] != _PROBE_BATCH or len(shape) < 2:
                continue
            nesting = _common(self.paths[i], self.paths[i + 1])
            cuts.append(Cut(i, _spatial(shape), _numel(shape), nesting))
        return cuts


def _tracer() -> NodePathTracer:
    modules, functions = _untraceable()
    return NodePathTracer(leaf_modules=modules, autowrap_functions=functions)


def trace_nodes(model: nn.Module) -> list[fx.Node]:
    """Trace a network in the mode it is in; `Stages.limits` are positions in this list."""
    return list(_tracer().trace(model).nodes)


def _untraceable() -> tuple[list[type[nn.Module]], list[Any]]:
    """Return timm's own lists of modules and functions to keep whole while tracing."""
    from timm.models._features_fx import get_notrace_functions, get_notrace_modules

    return list(get_notrace_modules()), list(get_notrace_functions())


def _common(a: list[str], b: list[str]) -> int:
    pairs = zip(a, b, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _spatial(shape: tuple[int, ...]) -> int:
    """Count positions per picture, whether channels come first (N, C, H, W) or last."""
    if len(shape) == 4:
        return shape[2] * shape[3] if shape[2] == shape[3] else shape[1] * shape[2]
    return shape[1] if len(shape) == 3 else 1


def _numel(shape: tuple[int, ...]) -> int:
    return functools.reduce(lambda a, b: a * b, shape, 1)
