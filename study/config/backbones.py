"""Modern backbones that `--download` adds to the default search space."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModernBackbone:
    """A backbone whose pretrained weights are downloaded; none of these was measured here.

    Attributes:
        name: As `train.backbone` takes it; its weights are timm's default ones.
        megabytes: Size of the weights' file.
        tag: Which weights those are, in timm's words.
        source: Where architecture and weights are described.
        reason: Why it is in the list.
    """

    name: str
    megabytes: int
    tag: str
    source: str
    reason: str


MODERN = (
    ModernBackbone(
        "timm:efficientnet_b0",
        21,
        "ra_in1k",
        "https://arxiv.org/abs/1905.11946",
        "the smallest common network above EfficientNet-Lite, with squeeze-and-excitation",
    ),
    ModernBackbone(
        "timm:tiny_vit_5m_224",
        48,
        "dist_in22k",
        "https://arxiv.org/abs/2207.10666",
        "a small hybrid of convolutions and attention, distilled on ImageNet-22k",
    ),
    ModernBackbone(
        "timm:convnext_nano",
        62,
        "in12k_ft_in1k",
        "https://arxiv.org/abs/2201.03545",
        "a modern convolutional network, pretrained on ImageNet-12k",
    ),
    ModernBackbone(
        "timm:vit_small_patch16_224",
        88,
        "augreg_in21k_ft_in1k",
        "https://arxiv.org/abs/2106.10270",
        "the usual small vision transformer, pretrained on ImageNet-21k",
    ),
    ModernBackbone(
        "timm:resnet50",
        102,
        "a1_in1k",
        "https://arxiv.org/abs/2110.00476",
        "the network that everyone compares with, trained by a modern recipe",
    ),
    ModernBackbone(
        "timm:convnext_tiny",
        114,
        "in12k_ft_in1k",
        "https://arxiv.org/abs/2201.03545",
        "ConvNeXt-nano's larger sibling",
    ),
)
"""In order of size."""
