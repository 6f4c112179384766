"""What a study would cost: time and disk, from measured passes of its networks."""

import functools
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from core.config import MAX_FREEZE_DEPTH, TrainConfig
from core.data.splits import ImageData
from core.device import amp_dtype, choose_device, synchronize
from core.fit import shares_arrays
from core.models.builder import Network, build, input_of
from core.models.freeze_stages import freeze, train_mode
from core.models.fx_graph import fold_norms
from core.models.layers import find_layers, tap
from core.training.activations import is_kept
from study.config.search_space import apply_params
from study.config.study_config import StudyConfig
from study.execution.session import corner_configs, is_on_this_machine, without_weights
from study.search.planner import NetworkCost, Planner, Step, freeze_depths, networks

_MEASURED_PASSES = 4
_MEASURED_STEPS = 2  # the first warms up
# A few images say what one takes, but small ones are quicker in larger numbers: at least eight,
# and as many as have the pixels of eight at 224 px, up to a batch.
_MEASURED_IMAGES, _MEASURED_PIXELS = 8, 8 * 224**2


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a study would cost if no trial were pruned.

    Attributes:
        device: Where it was measured.
        n_trials: Trials that would be run.
        trial_s: Mean seconds of a trial, all epochs.
        total_s: All trials; pruning makes it less.
        checkpoint_bytes: Checkpoints that are kept, at the largest backbone.
        plan: The trials of a plan whose thawed levels all gain; none without a plan.
    """

    device: str
    n_trials: int
    trial_s: float
    total_s: float
    checkpoint_bytes: int
    plan: tuple[Step, ...] = ()


def make_planner(config: StudyConfig, data: ImageData, run_id: int = 0) -> Planner:
    """Measure the networks of a space, and make the planner of a study, for one of its runs."""
    points = networks(config.space, config.train)
    costs = dict(zip(points, measure(points.values(), data), strict=True))
    at_first = {train.backbone: train for train in corner_configs(config)}
    sides = data.train.store.sizes[data.train.indices].min(axis=1)
    for point, train in points.items():
        first = at_first[train.backbone]
        shown = input_of(first.backbone, first.weights, first.image_size)
        if train.image_size != first.image_size and np.median(sides) <= shown.resize_size:
            del costs[point]  # a larger view of such images shows nothing more
    device = choose_device(config.train.device)
    return Planner(
        config.space,
        config.train,
        costs,
        len(data.train),
        len(data.val),
        len(data.classes),
        run_id,
        has_shared=config.study.cache != 0 and shares_arrays(device),
    )


def estimate_search(config: StudyConfig, data: ImageData) -> Estimate:
    """Estimate a search, as `estimate` does: every backbone at every freeze level counts alike."""
    trains = [
        apply_params(train, {"freeze_depth": depth})
        for train in corner_configs(config)
        for depth in freeze_depths(config.space, config.train)
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
    """Add up a study from the forecasts of its trials, as if none found its arrays cached.

    Args:
        trains: The settings that are run, or typical ones.
        data: Images.
        n_trials: Trials.
        n_kept: Checkpoints that stay on disk.
    """
    costs = measure(trains, data)
    counts = len(data.train), len(data.val), len(data.classes)
    trial_s = statistics.fmean(
        cost.seconds(train, *counts) for train, cost in zip(trains, costs, strict=True)
    )
    return Estimate(
        device=str(choose_device(trains[0].device)),
        n_trials=n_trials,
        trial_s=trial_s,
        total_s=trial_s * n_trials,
        checkpoint_bytes=n_kept * max(cost.weights_bytes for cost in costs),
    )


def measure(trains: Iterable[TrainConfig], data: ImageData) -> list[NetworkCost]:
    """Measure the networks of some configurations; return each one's cost.

    That is a forward pass of every backbone, to which other image sizes are in proportion, and,
    once it is asked for, a training step of the cheapest.
    """
    trains = list(trains)
    measured: dict[tuple[str, str], tuple[TrainConfig, NetworkCost]] = {}
    for train in trains:
        name = train.backbone, train.weights
        if name not in measured:
            measured[name] = train, _measured(train, data)
    cheapest = min(measured.values(), key=lambda found: found[1].forward_s)
    passes = functools.cache(lambda: _passes_of_step(*cheapest, data))
    costs = []
    for train in trains:
        first, cost = measured[train.backbone, train.weights]
        scale = (_image_size(train) / _image_size(first)) ** 2
        costs.append(replace(cost, forward_s=scale * cost.forward_s, step_passes=passes))
    return costs


def _image_size(train: TrainConfig) -> int:
    return input_of(train.backbone, train.weights, train.image_size).image_size


def _measured(train: TrainConfig, data: ImageData) -> NetworkCost:
    """Measure a network's forward pass; how many of them a step takes is left open."""
    network, images = _prepared(train, data)
    model = fold_norms(tap(network.model, find_layers(network)))
    with torch.inference_mode():
        forward_s = _seconds(lambda: model(images), train, _MEASURED_PASSES) / len(images)
    levels = range(MAX_FREEZE_DEPTH + 1)
    head = network.model.get_submodule(network.head[0])
    return NetworkCost(
        forward_s=forward_s,
        frozen=tuple(network.stages.frozen_flops_share(level) for level in levels),
        kept=tuple(
            is_kept(network.stages, replace(train, freeze_depth=level)) for level in levels
        ),
        n_features=2 * getattr(head, "in_features", 0),
        weights_bytes=sum(t.nbytes for t in network.model.state_dict().values()),
    )


def _passes_of_step(train: TrainConfig, cost: NetworkCost, data: ImageData) -> float:
    """Return how many forward passes a training step of a whole network takes."""
    network, images = _prepared(train, data)
    freeze(network.model, network.stages, 0)
    is_frozen = train.batch_norm == "frozen"
    train_mode(network.model, network.stages, 0, freeze_statistics=is_frozen)

    def step() -> None:
        torch.autograd.backward(network.model(images).float().square().mean())

    return _seconds(step, train, _MEASURED_STEPS) / len(images) / cost.forward_s


def _prepared(train: TrainConfig, data: ImageData) -> tuple[Network, Tensor]:
    """Build a network on its device, and a few images for it."""
    device, size = choose_device(train.device), _image_size(train)
    if not is_on_this_machine(train):
        # The time does not depend on the weights' values: none need be downloaded for a dry run.
        train = replace(without_weights(train), image_size=size)
    network = build(train, data.classes)
    network.model.to(device)
    n_images = min(train.batch_size, max(_MEASURED_IMAGES, _MEASURED_PIXELS // size**2))
    images = torch.randn(n_images, 3, size, size, device=device)
    return network, images.to(memory_format=torch.channels_last)


def _seconds(run: Callable[[], object], train: TrainConfig, n: int) -> float:
    """Return the seconds of the quickest of `n` passes."""
    device = choose_device(train.device)
    dtype = amp_dtype(train.amp, device)
    times = []
    for _ in range(n):
        begin = time.perf_counter()
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            run()
        synchronize(device)
        times.append(time.perf_counter() - begin)
    return min(times)
