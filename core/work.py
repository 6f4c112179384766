"""How much arithmetic a backbone's stages take: what a trial costs before any was run."""

from core.build import _stages, input_of
from core.weights import resolve


def stage_flops(backbone: str, weights: str, image_size: int | None) -> tuple[int, ...]:
    """Return the forward FLOPs of one picture in each stage, the head's (1,000 classes) last.

    Args:
        backbone: torchvision name or `timm:NAME`.
        weights: Source of the weights, as in `TrainConfig.weights`; none are read.
        image_size: Side of the input, pixels; None for the weights' own.

    Raises:
        BackboneError: Unknown backbone.
        StagesError: It cannot be divided into freeze levels.
    """
    side = input_of(backbone, weights, image_size).image_size
    return _stages(backbone, side, resolve(backbone, weights) != "none").flops
