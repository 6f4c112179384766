"""What a study would cost: time and disk, from a measured step of each backbone."""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from core.config import MAX_FREEZE_DEPTH, TrainConfig
from core.data.splits import ImageData
from core.device import amp_dtype, choose_device, synchronize
from core.models.builder import Network, build, input_of
from core.models.freeze_stages import freeze, train_mode
from core.models.fx_graph import fold_norms
from core.models.layers import find_layers, tap
from core.training.activations import is_kept
from study.config.errors import ConfigError
from study.config.search_space import ParamValue, apply_params, distributions, fits
from study.config.study_config import StudyConfig
from study.execution.session import corner_configs, is_on_this_machine, without_weights
from study.record.models import Trial
from study.search.planner import NetworkCost, Planner, Step, networks
from study.search.samplers import grid_of

PLAN_FILE = "plan.json"
"""What a study ran, in its folder."""
_MEASURED_STEPS = 4
_MEASURED_IMAGES = 8


@dataclass(frozen=True, slots=True)
class BackboneCost:
    """Seconds per image, in training by freeze level, and in evaluation; size of a checkpoint."""

    backbone: str
    image_size: int
    train_s: tuple[float, ...]
    eval_s: float
    weights_bytes: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a study would cost if no trial were pruned.

    Attributes:
        device: Where the steps were measured.
        n_trials: Trials that would be run.
        plan: The trials of a plan whose thawed levels all gain; none without a plan.
        costs: Per backbone.
        trial_s: Mean seconds of a trial, all epochs.
        total_s: All trials; pruning makes it less.
        checkpoint_bytes: Checkpoints that are kept, at the largest backbone.
    """

    device: str
    n_trials: int
    costs: tuple[BackboneCost, ...]
    trial_s: float
    total_s: float
    checkpoint_bytes: int
    plan: tuple[Step, ...] = ()


@dataclass(frozen=True, slots=True)
class PlannedTrial:
    """A trial in the file of a plan.

    Attributes:
        params: A value for every dimension.
        origin: Why it was run.
        forecast_s: Seconds that were foreseen; None where nothing was.
        duration_s: Seconds that it took.
    """

    params: dict[str, ParamValue]
    origin: str = "plan"
    forecast_s: float | None = None
    duration_s: float | None = None


_PLAN = TypeAdapter(list[PlannedTrial])


def write_plan(path: Path, rows: Sequence[Trial], forecasts: Mapping[int, float]) -> None:
    """Keep what a study ran, in its order, so that `--plan` can run it again."""
    found = [
        PlannedTrial(row.params, row.origin, forecasts.get(row.number), row.duration_s)
        for row in rows
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_PLAN.dump_json(found, indent=1) + b"\n")


def read_plan(path: Path, config: StudyConfig) -> list[PlannedTrial]:
    """Read a plan for a study.

    Raises:
        ConfigError: It cannot be read, or has settings outside the study's space.
    """
    try:
        found = _PLAN.validate_json(path.read_bytes())
    except (OSError, ValueError) as err:
        reason = " ".join(str(err).split("\n")[:2])
        raise ConfigError(f"--plan {path}: must be a study's {PLAN_FILE}, but {reason}.") from err
    for k, trial in enumerate(found):
        if not fits(config.space, trial.params):
            raise ConfigError(
                f"--plan {path}: trial {k} must lie in the study's space, but has {trial.params}. "
                "Use the same --config and --set as the study that left it."
            )
    return found


def make_planner(config: StudyConfig, data: ImageData) -> Planner:
    """Measure the networks of a space, and make the planner of a study."""
    costs = measure_networks(config, data)
    at_first = {train.backbone: train for train in corner_configs(config)}
    sides = data.train.store.sizes[data.train.indices].min(axis=1)
    for point, train in networks(config.space, config.train).items():
        first = at_first[train.backbone]
        shown = input_of(first.backbone, first.weights, first.image_size)
        if train.image_size != first.image_size and np.median(sides) <= shown.resize_size:
            del costs[point]  # a larger view of such images shows nothing more
    return Planner(
        config.space,
        config.train,
        costs,
        len(data.train),
        len(data.val),
        len(data.classes),
    )


def measure_networks(
    config: StudyConfig, data: ImageData
) -> dict[tuple[ParamValue, ...], NetworkCost]:
    """Measure a forward pass of every backbone of a space; other image sizes are in proportion."""
    measured: dict[tuple[str, str], tuple[int, NetworkCost]] = {}
    found = {}
    for point, train in networks(config.space, config.train).items():
        size = input_of(train.backbone, train.weights, train.image_size).image_size
        name = train.backbone, train.weights
        if name not in measured:
            measured[name] = size, _network_cost(train, data)
        own, cost = measured[name]
        found[point] = replace(cost, forward_s=cost.forward_s * (size / own) ** 2)
    return found


def _network_cost(train: TrainConfig, data: ImageData) -> NetworkCost:
    device = choose_device(train.device)
    size = input_of(train.backbone, train.weights, train.image_size).image_size
    if not is_on_this_machine(train):
        # The time does not depend on the weights' values: none need be downloaded for a dry run.
        train = replace(without_weights(train), image_size=size)
    network = build(train, data.classes)
    network.model.to(device)
    model = fold_norms(tap(network.model, find_layers(network)))
    images = torch.randn(_MEASURED_IMAGES, 3, size, size, device=device)
    images = images.to(memory_format=torch.channels_last)
    dtype = amp_dtype(train.amp, device)
    times = []
    for _ in range(_MEASURED_STEPS):
        begin = time.perf_counter()
        with (
            torch.inference_mode(),
            torch.autocast(device.type, dtype=dtype, enabled=dtype is not None),
        ):
            model(images)
        synchronize(device)
        times.append(time.perf_counter() - begin)
    levels = range(MAX_FREEZE_DEPTH + 1)
    head = network.model.get_submodule(network.head[0])
    return NetworkCost(
        min(times) / _MEASURED_IMAGES,
        tuple(network.stages.frozen_flops_share(level) for level in levels),
        tuple(
            is_kept(network.stages, replace(train, freeze_depth=level), device) for level in levels
        ),
        2 * getattr(head, "in_features", 0),
    )


def estimate_search(config: StudyConfig, data: ImageData) -> Estimate:
    """Estimate a search, as `estimate` does: every backbone at every freeze level counts alike."""
    own = {key: dim for key, dim in config.space.items() if key == "freeze_depth"}
    depths = grid_of(distributions(own)).get("freeze_depth", [config.train.freeze_depth])
    trains = [
        apply_params(train, {"freeze_depth": depth})
        for train in corner_configs(config)
        for depth in depths
    ]
    settings = config.study
    found = estimate(trains, data, n_trials=settings.trials or 1, n_kept=settings.keep_checkpoints)
    if config.search.strategy == "sampler":
        return found
    plan = make_planner(config, data).preview(settings.seconds)[: settings.trials]
    total_s = sum(step.forecast_s for step in plan)
    trial_s = total_s / max(1, len(plan))
    return replace(found, n_trials=len(plan), trial_s=trial_s, total_s=total_s, plan=tuple(plan))


def estimate(
    trains: Sequence[TrainConfig], data: ImageData, *, n_trials: int, n_kept: int
) -> Estimate:
    """Measure a training step and a forward pass of each network and add up a study.

    Between the measured levels (everything trained, head alone) a step's time follows the share
    of the forward pass that is not frozen. Decoding and augmentation are not in it.

    Args:
        trains: The settings that are run, or typical ones.
        data: Images.
        n_trials: Trials.
        n_kept: Checkpoints that stay on disk.
    """
    device = choose_device(trains[0].device)
    costs: dict[tuple[object, ...], BackboneCost] = {}
    seconds = []
    for train in trains:
        shape = (train.backbone, train.image_size, train.batch_size, train.micro_batch_size)
        if shape not in costs:
            costs[shape] = _measure(train, len(data.classes), device)
        seconds.append(_trial_seconds(train, costs[shape], data))
    trial_s = statistics.fmean(seconds)
    return Estimate(
        device=str(device),
        n_trials=n_trials,
        costs=tuple(costs.values()),
        trial_s=trial_s,
        total_s=trial_s * n_trials,
        checkpoint_bytes=n_kept * max(cost.weights_bytes for cost in costs.values()),
    )


def _trial_seconds(train: TrainConfig, cost: BackboneCost, data: ImageData) -> float:
    if train.is_solved:  # one pass over the evaluation views
        return (len(data.train) + len(data.val)) * cost.eval_s
    epoch_s = len(data.train) * cost.train_s[train.freeze_depth] + len(data.val) * cost.eval_s
    return train.epochs * epoch_s


def _measure(train: TrainConfig, n_classes: int, device: torch.device) -> BackboneCost:
    names = tuple(f"class {i}" for i in range(n_classes))
    side = input_of(train.backbone, train.weights, train.image_size).image_size
    # The time of a step does not depend on the weights' values: none need be downloaded.
    train = replace(without_weights(train), image_size=side)
    built = build(train, names)
    batch = min(train.batch_size, train.micro_batch_size or train.batch_size)
    images = torch.randn(batch, 3, side, side, device=device)
    images = images.to(memory_format=torch.channels_last)
    model = built.model.to(device)
    full = _seconds(train, model, built, images, 0, device)
    top = _seconds(train, model, built, images, MAX_FREEZE_DEPTH, device)
    shares = [built.stages.frozen_flops_share(d) for d in range(MAX_FREEZE_DEPTH + 1)]
    span = shares[MAX_FREEZE_DEPTH] or 1.0
    steps = tuple((full + (top - full) * share / span) / batch for share in shares)
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    return BackboneCost(train.backbone, side, steps, top / batch, size)


def _seconds(
    train: TrainConfig,
    model: nn.Module,
    built: Network,
    images: Tensor,
    depth: int,
    device: torch.device,
) -> float:
    """Time one training step at a freeze level: the median of a few, after one to warm up."""
    freeze(model, built.stages, depth)
    dtype = amp_dtype(train.amp, device)
    times = []
    for _ in range(_MEASURED_STEPS + 1):
        is_frozen = train.batch_norm == "frozen"
        train_mode(model, built.stages, depth, freeze_statistics=is_frozen)
        synchronize(device)
        begin = time.perf_counter()
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            loss = model(images).float().square().mean()
        torch.autograd.backward(loss)
        synchronize(device)
        times.append(time.perf_counter() - begin)
        model.zero_grad(set_to_none=True)
    return statistics.median(times[1:])
