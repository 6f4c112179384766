import math

import pytest
import timm

from core.models.builder import input_of
from core.models.sources import SOURCES, BackboneError, backbone_names, create


def test_names_of_both_libraries_are_listed() -> None:
    names = backbone_names()
    assert {"resnet18", "timm:tf_efficientnet_lite0"} <= set(names)
    assert "fcn_resnet50" not in names  # it segments


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("resnet50", "IMAGENET1K_V1, IMAGENET1K_V2"),
        ("timm:vit_small_patch8_224", "with TAG in dino"),
    ],
)
def test_unknown_tag_lists_the_known_ones(name: str, known: str) -> None:
    with pytest.raises(BackboneError, match=known):
        input_of(name, "imagenet:V9", None)


def test_every_tag_of_timm_has_a_place_and_its_own_preprocessing() -> None:
    for tagged in timm.list_pretrained():
        name, _, tag = tagged.partition(".")
        entry = SOURCES["timm:"].weights(name, tag or "DEFAULT")
        assert entry is not None and entry.origin, tagged
        ours = input_of(f"timm:{name}", f"imagenet:{tag}" if tag else "imagenet", None)
        settings = timm.models.get_pretrained_cfg(tagged).to_dict()
        theirs = timm.data.resolve_data_config(pretrained_cfg=settings)
        size, share = theirs["input_size"][1], min(1, theirs["crop_pct"])
        assert (ours.image_size, ours.resize_size) == (size, math.floor(size / share)), tagged
        assert [ours.mean, ours.std] == [theirs["mean"], theirs["std"]], tagged
        assert ours.interpolation == theirs["interpolation"], tagged
        assert ours.is_squashed == (theirs["crop_mode"] == "squash"), tagged


@pytest.mark.parametrize(
    ("name", "size", "head"),
    [("squeezenet1_1", 64, ("classifier.1",)), ("googlenet", 64, ("fc",))]
    + [("timm:deit_tiny_distilled_patch16_224", 224, ("head", "head_dist"))],
)
def test_classifiers_of_every_kind_are_found(name: str, size: int, head: tuple[str, ...]) -> None:
    network = create(name, size, 7, is_pretrained=False)
    assert network.head == head
    assert all(len(network.model.get_parameter(f"{layer}.weight")) == 7 for layer in head)


@pytest.mark.parametrize("name", ["resnet18", "timm:resnet18"])
def test_resize_follows_the_image_size_in_proportion(name: str) -> None:
    own, half = input_of(name, "none", None), input_of(name, "none", 112)
    assert (own.image_size, half.image_size) == (224, 112)
    assert half.resize_size == round(112 * own.resize_size / 224)
    assert input_of(name, "none", None, "none").std == (1.0, 1.0, 1.0)
