"""A network's graph as torch.fx follows it: what each node costs, and where it can be cut."""

import functools
import itertools
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import BatchNormAct2d
from timm.models._features_fx import get_notrace_functions, get_notrace_modules
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import NodePathTracer

# Three, since hardly any network has a dimension of three behind its first layer: a tensor whose
# first dimension is not three (windows of a Swin block, say) no longer holds one row per image.
_PROBE_BATCH = 3


@dataclass(frozen=True, slots=True)
class CutPoint:
    """A place between two nodes where one tensor is alive.

    Attributes:
        position: Index of the last node before the cut.
        numel: Elements of the tensor per image.
        nesting: Modules that hold both neighbours; small at the border of a large block.
    """

    position: int
    numel: int
    nesting: int


class _Measure(fx.Interpreter):
    """Runs the graph once and notes each node's FLOPs and its tensor's shape."""

    def __init__(self, module: fx.GraphModule, counter: FlopCounterMode) -> None:
        super().__init__(module)
        self.counter = counter
        self.flops: list[int] = []
        self.shapes: list[tuple[int, ...] | None] = []

    def run_node(self, n: fx.Node) -> Any:
        before = self.counter.get_total_flops()
        value = super().run_node(n)
        self.flops.append((self.counter.get_total_flops() - before) // _PROBE_BATCH)
        values = value if isinstance(value, (tuple, list)) else [value]
        is_computed = n.op != "get_attr" and any(isinstance(v, Tensor) for v in values)
        is_one = isinstance(value, Tensor) and value.is_floating_point()
        self.shapes.append((tuple(value.shape) if is_one else ()) if is_computed else None)
        return value


class TracedGraph:
    """A network's graph with what each node is called, uses, and costs.

    Attributes:
        paths: For each node the modules that it lies in, from the outermost.
        flops: Forward FLOPs per image, by node.
    """

    def __init__(self, model: nn.Module, image_size: int) -> None:
        """Trace a network on the CPU, in eval mode, and run it once."""
        tracer = _tracer()
        graph = tracer.trace(model.eval())
        images = torch.zeros(_PROBE_BATCH, 3, image_size, image_size)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            measure = _Measure(fx.GraphModule(model, graph), counter)
            measure.run(images)
        self.nodes = list(graph.nodes)
        self.paths = [tracer.node_to_qualname.get(node, "").split(".") for node in self.nodes]
        self.flops = measure.flops
        # Empty where a node gives more than one tensor; None where it gives none, or a parameter,
        # which can be read at any time.
        self._shapes = measure.shapes
        index = {node: i for i, node in enumerate(self.nodes)}
        self._last_use = [
            max((index[user] for user in node.users), default=i)
            for i, node in enumerate(self.nodes)
        ]

    def parameter_uses(self, model: nn.Module) -> dict[str, int]:
        """Map each used parameter to the last node that uses it."""
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        uses: dict[str, int] = {}
        for i, node in enumerate(self.nodes):
            found: list[Any] = []
            at = i
            if node.op == "call_module":
                found = list(model.get_submodule(str(node.target)).parameters())
            elif node.op == "get_attr":
                found = [functools.reduce(getattr, str(node.target).split("."), model)]
                at = self._last_use[i]
            for name in (names[id(value)] for value in found if id(value) in names):
                uses[name] = max(uses.get(name, 0), at)
        return uses

    def module_ends(self) -> dict[str, int]:
        """Map each module to the last node in it, in the order of their first nodes."""
        ends: dict[str, int] = {}
        for i, (node, path) in enumerate(zip(self.nodes, self.paths, strict=True)):
            if node.op not in ("placeholder", "output"):
                # A node that calls no module is named after itself within its module.
                modules = path if node.op == "call_module" else path[:-1]
                ends.update(dict.fromkeys(itertools.accumulate(modules, "{}.{}".format), i))
        return ends

    def cut_points(self, end: int) -> list[CutPoint]:
        """List the cut points before node `end`, in the graph's order."""
        cuts = []
        alive: set[int] = set()
        for i in range(end):
            new = alive if self._shapes[i] is None else {*alive, i}
            alive = {j for j in new if self._last_use[j] > i}
            shape = self._shapes[next(iter(alive))] if len(alive) == 1 else None
            if shape and len(shape) >= 2 and shape[0] == _PROBE_BATCH:
                pairs = zip(self.paths[i], self.paths[i + 1], strict=False)
                shared = itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)
                cuts.append(CutPoint(i, math.prod(shape[1:]), len(list(shared))))
        return cuts


def trace_nodes(model: nn.Module) -> list[fx.Node]:
    """Trace a network in the mode it is in; `Stages.limits` are positions in this list."""
    return list(_tracer().trace(model).nodes)


def fold_norms(module: fx.GraphModule) -> fx.GraphModule:
    """Fold batch norms into the convolutions before them; it computes the same but for rounding.

    The module, in eval mode, is changed; the layers of the network that it was made of are not.
    """
    layers = dict(module.named_modules())
    uses = Counter(str(node.target) for node in module.graph.nodes)
    for node in module.graph.nodes:
        before = node.args[0] if node.args else None
        if node.op != "call_module" or not isinstance(before, fx.Node) or len(before.users) > 1:
            continue
        names = str(before.target), str(node.target)
        conv, norm = layers.get(names[0]), layers[names[1]]
        if type(norm) not in (nn.BatchNorm2d, BatchNormAct2d) or norm.running_mean is None:
            continue
        if isinstance(conv, nn.Conv2d) and uses[names[0]] == uses[names[1]] == 1:
            module.set_submodule(names[0], fuse_conv_bn_eval(conv, norm))
            # timm's norms hold their dropout and activation.
            module.set_submodule(names[1], nn.Sequential(*norm.children()))
    return module


def _tracer() -> NodePathTracer:
    # timm's own lists of what to keep whole while tracing.
    return NodePathTracer(
        leaf_modules=list(get_notrace_modules()), autowrap_functions=list(get_notrace_functions())
    )
