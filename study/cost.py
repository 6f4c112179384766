"""What a trial costs before it is run: its arithmetic, what shared work spares, and a start-up.

The arithmetic is counted, so the figure is the same on every machine and at every load, and a
sampler that weighs settings by it draws the same again. Where seconds are wanted (a forecast), a
model that has observed some trials corrects itself by them, per backbone.
"""

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from core.config import MAX_FREEZE_DEPTH, TrainConfig

StageFlops = Callable[[str, str, int | None], tuple[int, ...]]
"""From backbone, weights and input size to the forward FLOPs of a picture in each stage."""

# A backward pass takes twice the forward pass: once for the inputs, once for the weights.
_TRAIN_FACTOR = 3
# FLOPs a second. On a core of an EPYC, recorded epochs of EfficientNet-Lite0 and MobileNetV2 at 64
# and 96 px (49 trials) took 0.6 to 1.6 times what this says at levels 0 to 4: good enough to
# choose by. Those of GPUs are assumptions. Only the ratio to the start-up matters.
_RATES = {"cpu": 3e10, "mps": 1e12, "cuda": 3e12}
# Building the network and keeping the trial's record, seconds: assumption; a whole trial of a head
# on cached features took 0.1 to 0.3 s.
_TRIAL_S = 0.5
# Cutting and scaling one picture for a training view, seconds: peers measured 0.3 to 0.6 ms.
_VIEW_S = 5e-4
# Forward FLOPs by stage of a backbone that cannot be counted: as of EfficientNet-Lite0, 224 px.
_UNKNOWN = (160_000_000,) * 5 + (2_500_000,)
# How many observed trials the belief that all backbones are alike is worth. Assumption.
_PRIOR_TRIALS = 1.0


@dataclass(slots=True)
class CostModel:
    """Predicts a trial's seconds from its settings.

    Attributes:
        base: What every trial of the study has in common.
        n_train: Training pictures.
        n_val: Validation pictures.
        stage_flops: Counts a backbone's arithmetic: `core.build.stage_flops`.
        device: Its kind: cpu, cuda or mps.
        is_shared: Whether trials share views and frozen layers' outputs.
        shares_heads: Whether those that train the head alone share its features; None for as the
            others.
    """

    base: TrainConfig
    n_train: int
    n_val: int
    stage_flops: StageFlops
    device: str = "cpu"
    is_shared: bool = True
    shares_heads: bool | None = None
    _log_ratios: dict[str, list[float]] = field(default_factory=dict)
    _flops: dict[tuple[str, str, int | None], tuple[int, ...]] = field(default_factory=dict)

    def shared_by(self, params: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return what two trials must agree on to read the same frozen layers' outputs."""
        names = ("backbone", "weights", "freeze_depth", "image_size", "seed", "batch_size")
        views = ("augment", "crop_scale", "flip", "rand_magnitude", "normalize")
        return tuple(self._value(params, name) for name in names + views)

    def predict(
        self, params: Mapping[str, Any], epochs: int | None = None, cached_epochs: int = 0
    ) -> float:
        """Predict a trial's seconds.

        Args:
            params: Its settings; those that it does not name are the study's.
            epochs: How many of them it runs; None for all.
            cached_epochs: Of how many the frozen layers' outputs are there already.

        A backbone that cannot be counted costs what a small one does at 224 px.
        """
        backbone = str(self._value(params, "backbone"))
        return self._counted(params, epochs, cached_epochs) * math.exp(self._correction(backbone))

    def observe(
        self,
        params: Mapping[str, Any],
        epochs: int,
        seconds: float,
        cached_epochs: int = 0,
    ) -> None:
        """Take in how long a trial took.

        Args:
            params: Its settings.
            epochs: Epochs that it ran.
            seconds: Its wall time, > 0; others are passed over.
            cached_epochs: As in `predict`, when it began.
        """
        if not (epochs > 0 and 0 < seconds < math.inf):
            return
        ratio = math.log(seconds / self._counted(params, epochs, cached_epochs))
        self._log_ratios.setdefault(str(self._value(params, "backbone")), []).append(ratio)

    def _value(self, params: Mapping[str, Any], name: str) -> Any:
        return params[name] if name in params else getattr(self.base, name)

    def _counted(self, params: Mapping[str, Any], epochs: int | None, cached_epochs: int) -> float:
        """Return the seconds at the assumed rate."""
        depth = int(self._value(params, "freeze_depth"))
        n_epochs = int(self._value(params, "epochs")) if epochs is None else epochs
        is_shared = self.is_shared
        if depth == MAX_FREEZE_DEPTH and self.shares_heads is not None:
            is_shared = self.shares_heads
        is_kept = is_shared and depth > 0
        cached = min(cached_epochs, n_epochs) if is_kept else 0
        flops = self._stage_flops(params, self._value(params, "image_size"))
        prefix, suffix = sum(flops[:depth]), sum(flops[depth:])
        per_picture = (n_epochs - cached) * prefix
        per_picture += n_epochs * _TRAIN_FACTOR * suffix
        # Validation pictures pass through the prefix once a boundary where that is kept.
        val_prefix = int(cached_epochs == 0) if is_kept else n_epochs
        work = self.n_train * per_picture + self.n_val * (val_prefix * prefix + n_epochs * suffix)
        views = 0 if is_shared else n_epochs * self.n_train * _VIEW_S
        return _TRIAL_S + views + work / _RATES.get(self.device, _RATES["cpu"])

    def _stage_flops(self, params: Mapping[str, Any], size: int | None) -> tuple[int, ...]:
        backbone, weights = (
            str(self._value(params, "backbone")),
            str(self._value(params, "weights")),
        )
        key = (backbone, weights, size)
        if key not in self._flops:
            try:
                self._flops[key] = self.stage_flops(*key)
            except ValueError:  # the trial will say so itself; a search goes on without it
                self._flops[key] = _UNKNOWN
        return self._flops[key]

    def _correction(self, backbone: str) -> float:
        """Return the logarithm of observed over counted seconds: a backbone's, shrunk to all."""
        every = [ratio for ratios in self._log_ratios.values() for ratio in ratios]
        if not every:
            return 0.0
        common = statistics.fmean(every)
        own = self._log_ratios.get(backbone, [])
        return common + sum(r - common for r in own) / (len(own) + _PRIOR_TRIALS)


def cost_model(base: TrainConfig, n_train: int, n_val: int, *, is_cached: bool) -> CostModel:
    """Return the cost model of a study.

    Args:
        base: What its trials have in common.
        n_train: Training pictures.
        n_val: Validation pictures.
        is_cached: Whether trials may share work at all.

    Raises:
        ValueError: The device cannot be used.
    """
    from core.build import stage_flops
    from core.device import choose_device

    device = choose_device(base.device)
    return CostModel(base, n_train, n_val, stage_flops, device.type, is_cached, is_cached)
