import gc
import weakref
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from core import build as build_
from core.backbones import Network, create
from core.build import Built, build
from core.network_pool import NetworkPool, Start
from core.split import split_network
from core.stages import freeze, train_mode


def _small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def _start(model: nn.Module | None = None) -> Start:
    return Start(Network(model or _small(), ("3",)), {"3.weight": torch.ones(5, 4)})


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def _spoil(model: nn.Module) -> None:
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(1)


def test_copies_share_no_tensor_with_each_other_or_with_the_first() -> None:
    pool, start = NetworkPool(1 << 20), _start()
    before = _state(start.network.model)
    pool.keep("a", start)
    _spoil(start.network.model)
    first = pool.take("a")
    assert first is not None
    assert _equal(_state(first.network.model), before)
    _spoil(first.network.model)
    second = pool.take("a")
    assert second is not None
    assert _equal(_state(second.network.model), before)
    assert second.network.head == ("3",)
    assert pool.take("b") is None


def test_a_copy_has_the_layout_the_ties_and_the_attributes_of_the_original() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Linear(4, 4), nn.Linear(4, 4))
    model.to(memory_format=torch.channels_last)
    model[2].weight = model[1].weight
    model[1].bias.requires_grad_(False)
    model[0].bias.source = "here"
    model.register_buffer("places", torch.arange(3), persistent=False)
    pool = NetworkPool(1 << 20)
    pool.keep("a", _start(model))
    found = pool.take("a")
    assert found is not None
    copied = found.network.model
    assert isinstance(copied, nn.Sequential)
    assert copied[0].weight.stride() == model[0].weight.stride()
    assert copied[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert copied[2].weight is copied[1].weight
    assert isinstance(copied[1].weight, nn.Parameter)
    assert not copied[1].bias.requires_grad
    assert copied[0].bias.source == "here"
    assert torch.equal(copied.get_buffer("places"), torch.arange(3))


def test_the_budget_holds_the_networks_used_last() -> None:
    one = _start()
    pool = NetworkPool(1 << 20)
    pool.keep("a", one)
    pool = NetworkPool(2 * pool.size_bytes)
    for key in ("a", "b"):
        pool.keep(key, one)
    assert pool.take("a") is not None
    pool.keep("c", one)
    assert [pool.take(key) is not None for key in "abc"] == [True, False, True]
    assert pool.size_bytes <= pool.budget_bytes
    pool.keep("large", _start(nn.Linear(1000, 1000)))
    assert len(pool) == 2
    pool.clear()
    assert (len(pool), pool.size_bytes) == (0, 0)


def test_a_network_with_a_function_of_its_own_is_not_kept() -> None:
    model = _small()
    model.extra = lambda: 0
    pool = NetworkPool(1 << 20)
    pool.keep("a", _start(model))
    assert len(pool) == 0


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> NetworkPool:
    empty = NetworkPool(1 << 28)
    monkeypatch.setattr(build_, "_POOL", empty)
    return empty


@pytest.mark.parametrize(
    ("weights", "head_init"),
    [("none", "default"), ("file", "xavier"), ("none", "zero"), ("file", "source-classes")],
)
def test_a_copied_start_is_what_building_gives(
    pool: NetworkPool, tmp_path: Path, weights: str, head_init: str
) -> None:
    if weights == "file":
        path = tmp_path / "w.safetensors"
        network = create("mobilenet_v3_small", 64, 1000, is_pretrained=False)
        safetensors.torch.save_file(network.model.state_dict(), path)
        weights = str(path)

    def built(seed: int) -> Built:
        return build(
            "mobilenet_v3_small",
            weights,
            ("hot dog", "b"),
            seed=seed,
            image_size=64,
            head_init=head_init,
        )

    fresh = {}
    for seed in (0, 1):
        pool.clear()
        found = built(seed)
        fresh[seed] = (_state(found.model), found.n_source_rows)
    for seed in (0, 1, 0):
        copied = built(seed)
        assert _equal(_state(copied.model), fresh[seed][0])
        assert copied.n_source_rows == fresh[seed][1]
        _spoil(copied.model)
    assert len(pool) == (2 if weights == "none" else 1)


def test_weights_that_were_replaced_are_read_again(pool: NetworkPool, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    state = create("mobilenet_v3_small", 64, 1000, is_pretrained=False).model.state_dict()
    name = "features.0.0.weight"
    for value in (1.0, 2.0):
        state[name] = torch.full_like(state[name], value)
        path.unlink(missing_ok=True)
        safetensors.torch.save_file(state, path)
        for _ in range(2):
            built = build("mobilenet_v3_small", str(path), ("a", "b"), seed=0, image_size=64)
            assert (built.model.state_dict()[name] == value).all()


def test_channels_last_changes_the_layout_alone(pool: NetworkPool) -> None:
    plain, laid = (
        build("resnet18", "none", ("a", "b"), seed=0, image_size=64, channels_last=last)
        for last in (False, True)
    )
    assert _equal(_state(plain.model), _state(laid.model))
    weights = [p for p in laid.model.parameters() if p.ndim == 4]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
    as_fit_does = plain.model.to(memory_format=torch.channels_last).state_dict()
    assert {k: v.stride() for k, v in as_fit_does.items()} == {
        k: v.stride() for k, v in laid.model.state_dict().items()
    }


@pytest.mark.parametrize(("backbone", "size"), [("mobilenet_v3_small", 64), ("squeezenet1_1", 64)])
def test_halves_from_an_earlier_trace_do_what_this_network_does(backbone: str, size: int) -> None:
    """Traced on one network, run on another with other weights and more classes."""
    first = build(backbone, "none", ("a", "b"), seed=0, image_size=size)
    split_network(first.model, first.stages, 3, freeze_statistics=True)
    assert (3, True) in first.stages.plans
    gone = weakref.ref(first.model)
    del first
    gc.collect()
    assert gone() is None  # what is kept holds names, no network
    other = build(backbone, "none", ("a", "b", "c"), seed=1, image_size=size)
    halves = split_network(other.model, other.stages, 3, freeze_statistics=True)
    assert halves is not None
    freeze(other.model, other.stages, 3)
    images = torch.randn(2, 3, size, size)
    crossing = halves.prefix(images)
    assert torch.equal(halves.eval_suffix(crossing), other.model.eval()(images))
    train_mode(other.model, other.stages, 3, freeze_statistics=True)
    torch.manual_seed(1)
    whole = other.model(images)
    torch.manual_seed(1)
    assert torch.equal(halves.train_suffix(crossing), whole)


def test_a_constant_computed_while_tracing_is_not_taken_to_another_network() -> None:
    class Scaled(nn.Module):
        """Adds what it computes from a buffer, without the input."""

        def __init__(self, value: float) -> None:
            super().__init__()
            self.layers = nn.Sequential(*(nn.Linear(3, 3) for _ in range(6)))
            self.register_buffer("shift", torch.tensor(value))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return x + self.shift * 2

    stages = build_._stages("resnet18", 64, False)
    names = tuple(() for _ in range(6))
    own = type(stages)({}, names, (), (), (-1, 1, 2, 3, 4, 5))
    rows = torch.randn(2, 3)
    for value in (1.0, 5.0):
        model = Scaled(value)
        halves = split_network(model, own, 2, freeze_statistics=False)
        assert halves is not None
        assert torch.equal(halves.eval_suffix(halves.prefix(rows)), model(rows))
    assert own.plans == {}
