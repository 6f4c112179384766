"""Fine-tune one network: a generator of one `EpochMetrics` per epoch."""

import tempfile
import time
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from core.cache import ArrayCache
from core.config import TrainConfig
from core.data.splits import ImageData
from core.device import choose_device, deterministic, peak_memory_bytes, seeded
from core.heads.solved_head import fit_solved, start_from_solved
from core.metrics import EpochMetrics, Evaluation, Interrupted, Reference, TrainingDiverged
from core.models.builder import build
from core.models.freeze_stages import freeze
from core.models.partition import cut, whole
from core.models.sources import library_versions
from core.training.activations import Activations, Run, is_kept
from core.training.batches import Views
from core.training.checkpoint import (
    REFIT_FILE,
    Card,
    read_card,
    save_checkpoint,
    save_tensors,
    write_predictions,
)
from core.training.resume import Best, TrainingState
from core.training.trainer import Trainer, check_batches

_TAG_DROPOUT = 101


def fit(
    config: TrainConfig,
    data: ImageData,
    *,
    cache: ArrayCache | None = None,
    checkpoint_dir: Path | None = None,
    state_file: Path | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    on_step: Callable[[float], None] = lambda epochs: None,
) -> Generator[EpochMetrics, None, None]:
    """Fine-tune a network and yield each epoch's figures.

    Equal configuration, data and device give equal figures, with or without cache, and continued
    from a state file or not. The caller may stop early by closing the generator; a checkpoint is
    written only by a run that reaches its last epoch.

    Args:
        config: What to train, and how.
        data: Images; `train` and `val` are read, `test` never.
        cache: Where outputs of frozen layers are kept for other runs; None keeps none.
        checkpoint_dir: Where the best epoch's weights, card and validation predictions go.
        state_file: Where the state of the run is kept, and continued from if it is this run's. It
            is the caller's to remove.
        should_stop: Asked after each step, of a head's solver too, and each chunk of images that
            goes through frozen layers; True ends the run, and saves what has been trained.
        on_step: Called after each step with the epochs done, the unfinished one by its share.

    Raises:
        Interrupted: `should_stop` said so.
        TrainingDiverged: The loss is not a finite number any more.
        ValueError: The backbone, its weights, the device or the batch size cannot be used.
        OSError: The checkpoint or the state file cannot be written.
    """
    device = choose_device(config.device)
    cache = _shared_on(device, cache)
    data = data.with_share(config.train_fraction)
    network = build(config, data.classes)
    check_batches(config, network, len(data.train))
    network.model.to(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    run = Run(config, network, data, cache, should_stop)
    if config.is_solved:
        with deterministic(device):
            metrics, (rest, evaluation), network, refitted = fit_solved(run)
        yield metrics
        if checkpoint_dir is not None:
            run = replace(run, network=network)
            _save(checkpoint_dir, run, Best(metrics, evaluation, {}), rest)
            save_tensors(checkpoint_dir / REFIT_FILE, refitted)
        return
    reference = Reference()
    if config.head_init == "solved":
        with deterministic(device):
            reference = start_from_solved(run)
    trainer = _trainer(run)
    state = TrainingState(state_file, run, trainer)
    best = state.restore()
    while (epoch := trainer.position.epoch) < config.epochs:
        saved_s, hits, misses = cache.saved_s, cache.hits, cache.misses
        with deterministic(device), seeded(_dropout_seed(config, epoch), device):
            state.restore_random()
            try:
                for _ in trainer.train_epoch():
                    run.pulse()
                    on_step(epoch + trainer.position.step / trainer.steps_per_epoch)
                    state.save_if_due(best)
                begin = time.perf_counter()
                evaluation = trainer.evaluate()
                eval_s = time.perf_counter() - begin
            except Interrupted:
                state.save(best)
                raise
        metrics = replace(
            _epoch_metrics(config, trainer, evaluation, best, reference),
            eval_s=eval_s,
            peak_memory_bytes=peak_memory_bytes(device),
            saved_s=cache.saved_s - saved_s,
            cache_hits=cache.hits - hits,
            cache_misses=cache.misses - misses,
        )
        if metrics.is_best:
            best = Best(metrics, evaluation, trainer.snapshot())
        trainer.end_epoch()
        yield metrics
        # Only now: the caller has recorded the epoch, which the state then counts as done.
        state.save_if_due(best, after_epoch=True)
    if best is not None and checkpoint_dir is not None:
        _save(checkpoint_dir, run, best)


def refit(
    config: TrainConfig,
    data: ImageData,
    checkpoint: Path,
    *,
    cache: ArrayCache,
    should_stop: Callable[[], bool],
) -> None:
    """Train a complete run again on all images but the test split, and keep that beside it.

    It is trained as long as its best epoch says, on the same share of the training images, and
    evaluated on nothing: no image is left that it has not seen. A solved head needs none of this:
    `fit` has kept its refit. Where `should_stop` says so, `Interrupted` is raised and nothing is
    kept.
    """
    n_epochs = read_card(checkpoint).metrics.epoch
    data = data.with_share(config.train_fraction)
    device = choose_device(config.device)
    network = build(config, data.classes)
    check_batches(config, network, len(data.development))
    network.model.to(device)
    run = Run(config, network, data, _shared_on(device, cache), should_stop)
    if config.head_init == "solved":
        with deterministic(device):
            start_from_solved(run, is_refit=True)
    trainer = _trainer(replace(run, data=replace(data, train=data.development)))
    for epoch in range(n_epochs):
        with deterministic(device), seeded(_dropout_seed(config, epoch), device):
            for _ in trainer.train_epoch():
                run.pulse()
        trainer.end_epoch()
    save_tensors(checkpoint / REFIT_FILE, {**network.model.state_dict(), **trainer.snapshot()})


def shares_arrays(device: torch.device) -> bool:
    """Say whether a device's kernels are named well enough to keep arrays for other runs."""
    return device.type in ("cpu", "cuda")


def _shared_on(device: torch.device, cache: ArrayCache | None) -> ArrayCache:
    """Return the cache where a device's arrays may be kept for other runs, else an empty one."""
    if cache is None or not shares_arrays(device):
        return ArrayCache(Path(tempfile.gettempdir()), 0)
    return cache


def _trainer(run: Run) -> Trainer:
    config, network, device = run.config, run.network, run.device
    freeze(network.model, network.stages, config.freeze_depth)
    if is_kept(network.stages, config) and (parts := cut(network, config)):
        make_prefix, suffix = parts
        return Trainer(run, suffix, Activations(run, make_prefix))
    views = Views(config, network.preprocessing, run.data, device)
    return Trainer(run, whole(network, config), views)


def _dropout_seed(config: TrainConfig, epoch: int) -> int:
    seed = np.random.SeedSequence((config.seed, _TAG_DROPOUT, epoch))
    return int(seed.generate_state(1, np.uint64)[0])


def _save(folder: Path, run: Run, best: Best, out_of_fold: Evaluation | None = None) -> None:
    """Write the best epoch's weights, card and predictions."""
    config, network, data = run.config, run.network, run.data
    card = Card(
        backbone=config.backbone,
        classes=data.classes,
        preprocessing=replace(network.preprocessing, grey_range=data.views.grey_range),
        config=config,
        metrics=best.metrics,
        weights=network.weights,
        layers=network.layers,
        data={"source": data.source, "fingerprint": data.fingerprint},
        versions=library_versions(),
    )
    (folder / REFIT_FILE).unlink(missing_ok=True)  # of an earlier run in this folder
    save_checkpoint(folder, {**network.model.state_dict(), **best.weights}, card)
    write_predictions(folder, best.evaluation, data.val.paths, out_of_fold)


def _epoch_metrics(
    config: TrainConfig,
    trainer: Trainer,
    evaluation: Evaluation,
    best: Best | None,
    reference: Reference,
) -> EpochMetrics:
    """Return the figures of the epoch that a trainer has just done."""
    at = trainer.position
    if not evaluation.loss < float("inf"):  # NaN, too
        raise TrainingDiverged(
            f"the validation loss is no longer finite at epoch {at.epoch + 1}; lower base_lr."
        )
    score = reference.score(evaluation, config.monitor)
    return EpochMetrics(
        epoch=at.epoch + 1,
        train_loss=float(trainer.loss_sum) / at.n_images,
        val_loss=evaluation.loss,
        val_acc=evaluation.acc,
        val_balanced_acc=evaluation.balanced_acc,
        val_macro_f1=evaluation.macro_f1,
        base_lr=config.base_lr * trainer.lr_factor,
        head_lr=config.base_lr * config.head_lr_mult * trainer.lr_factor,
        images_per_s=at.n_images / (at.data_s + at.train_s),
        data_s=at.data_s,
        train_s=at.train_s,
        eval_s=0.0,
        peak_memory_bytes=0,
        micro_batch_size=trainer.micro_batch_size,
        is_best=best is None or score > best.metrics.ranked_by,
        score=score,
    )
