import torch

from core.backbones import create, imagenet_classes
from core.head import init_head, matching_rows


def _network():
    return create("resnet18", 64, 2, is_pretrained=False)


def _source() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "fc.weight": torch.randn(1000, 512, generator=generator),
        "fc.bias": torch.randn(1000, generator=generator),
    }


def test_head_depends_on_the_seed_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, second, other = _network(), _network(), _network()
    torch.random.set_rng_state(before)
    init_head(first, "default", 1)
    init_head(second, "default", 1)
    init_head(other, "default", 2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first.model.fc.weight, second.model.fc.weight)
    assert not torch.equal(first.model.fc.weight, other.model.fc.weight)


def test_xavier_keeps_its_bounds_and_zero_is_zero() -> None:
    network = _network()
    init_head(network, "xavier", 0)
    bound = (6 / (512 + 2)) ** 0.5
    weight = network.model.fc.weight
    assert weight.abs().max() <= bound
    assert weight.abs().max() > 0.9 * bound
    init_head(network, "zero", 0)
    assert not network.model.fc.weight.any()
    assert not network.model.fc.bias.any()


def test_source_classes_copies_the_rows_of_equal_names() -> None:
    network, source = _network(), _source()
    copied = init_head(
        network, "source-classes", 0, classes=("not_hotdog", "Hot_Dog"), source=source
    )
    assert copied == 1
    row = imagenet_classes().index("hotdog")
    assert torch.equal(network.model.fc.weight[1], source["fc.weight"][row])
    assert torch.equal(network.model.fc.bias[1], source["fc.bias"][row])
    plain = _network()
    init_head(plain, "default", 0)
    assert torch.equal(network.model.fc.weight[0], plain.model.fc.weight[0])


def test_source_classes_without_a_source_classifier_starts_as_default() -> None:
    network, plain = _network(), _network()
    assert init_head(network, "source-classes", 0, classes=("hotdog", "b"), source=None) == 0
    init_head(plain, "default", 0)
    assert torch.equal(network.model.fc.weight, plain.model.fc.weight)


def test_names_match_whatever_their_case_and_separators() -> None:
    assert matching_rows(("Hot Dog", "cat"), ("tench", "hotdog", "hotdog")) == {0: 1}
