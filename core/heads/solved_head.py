"""A head that is solved: logistic regression on what the frozen network makes of the images."""

import time
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from core.config import TrainConfig
from core.data.partition import partition
from core.data.splits import ImageData
from core.device import peak_memory_bytes
from core.heads.solver import SolvedHead, solve_head
from core.metrics import EpochMetrics, Evaluation, Reference
from core.models.builder import Network
from core.models.layers import find_layers, solved_network
from core.training.activations import Run, evaluation_features

_FOLDS = 5


def solve(run: Run) -> tuple[SolvedHead, Tensor]:
    """Solve a head on all images but the test split, in folds of which 0 is the validation split.

    It depends on the features and `head_decay` alone: on no seed, and on no other option.

    Returns:
        The head, and the features in the order of the training and the validation images.
    """
    data, decay, device = run.data, run.config.head_decay, run.device
    features = evaluation_features(run)
    own = partition(data.train.labels.tolist(), data.train.contents, _FOLDS - 1, 0)
    folds = np.concatenate([own + 1, np.zeros(len(data.val), dtype=np.int64)])
    labels = np.concatenate([data.train.labels, data.val.labels])
    solved = solve_head(
        features.to(device),
        torch.from_numpy(labels).to(device),
        len(data.classes),
        torch.from_numpy(folds),
        None if decay == "auto" else [decay],
        run.pulse,
    )
    return solved, features


def start_from_solved(run: Run, *, is_refit: bool = False) -> Reference:
    """Set a network's head to the one that is solved on the training images' last layer.

    With `is_refit` it is solved on the validation images, too. The return value says how much
    easier or harder the validation split is for that head than all images are.
    """
    solved, _ = solve(replace(run, config=replace(run.config, features="last", mirrored=False)))
    head = (solved.weight, solved.bias) if is_refit else solved.apart
    _set_head(run.network.model.get_submodule(run.network.head[0]), head)
    everything, val = _out_of_fold(solved, run.data)
    # One more wrong image in each: few images may all be right.
    error = (1 - everything.acc + 1 / len(everything.labels)) / (1 - val.acc + 1 / len(val.labels))
    return Reference(everything.loss / max(val.loss, 1e-9), error)


def fit_solved(
    run: Run,
) -> tuple[EpochMetrics, tuple[Evaluation, Evaluation], Network, dict[str, Tensor]]:
    """Solve a network's head and evaluate it, as the one epoch of its run.

    Returns:
        The figures, the out-of-fold predictions for the training and for the validation split,
        the network with its head, and the head's tensors, by their names in it, when all images
        but the test split are fitted.
    """
    config, data, cache = run.config, run.data, run.cache
    begin = time.perf_counter()
    saved_s, hits, misses = cache.saved_s, cache.hits, cache.misses
    solved, features = solve(run)
    n_train = len(data.train)
    weight, bias = (part.cpu() for part in solved.apart)
    fitted = Evaluation(
        data.train.labels, (features[:n_train] @ weight.t() + bias).log_softmax(dim=1).numpy()
    )
    everything, evaluation = _out_of_fold(solved, data)
    spent = time.perf_counter() - begin
    metrics = EpochMetrics(
        epoch=1,
        train_loss=fitted.loss,
        val_loss=evaluation.loss,
        val_acc=evaluation.acc,
        val_balanced_acc=evaluation.balanced_acc,
        val_macro_f1=evaluation.macro_f1,
        base_lr=0.0,
        head_lr=0.0,
        images_per_s=n_train / spent,
        data_s=0.0,
        train_s=spent,
        eval_s=0.0,
        peak_memory_bytes=peak_memory_bytes(run.device),
        micro_batch_size=config.micro_batch_size or config.batch_size,
        is_best=True,
        saved_s=cache.saved_s - saved_s,
        cache_hits=cache.hits - hits,
        cache_misses=cache.misses - misses,
        score=Reference().score(everything, config.monitor),
    )
    network = _with_head(run.network, config, solved)
    name = network.head[0]
    refit = {f"{name}.weight": solved.weight.cpu(), f"{name}.bias": solved.bias.cpu()}
    rest = Evaluation(data.train.labels, everything.log_probs[:n_train])
    return metrics, (rest, evaluation), network, refit


def _out_of_fold(solved: SolvedHead, data: ImageData) -> tuple[Evaluation, Evaluation]:
    """Return what a head says about all images by the folds that lack them, and of the last."""
    log_probs = solved.oof_log_probs.float().cpu().numpy()
    labels = np.concatenate([data.train.labels, data.val.labels])
    n_train = len(data.train)
    return Evaluation(labels, log_probs), Evaluation(data.val.labels, log_probs[n_train:])


def _with_head(network: Network, config: TrainConfig, solved: SolvedHead) -> Network:
    """Return the network with its solved head: its own layer, or one on several layers."""
    if config.features == "last":
        _set_head(network.model.get_submodule(network.head[0]), solved.apart)
        return network
    layers = find_layers(network)
    head = nn.Linear(solved.weight.shape[1], solved.weight.shape[0])
    _set_head(head, solved.apart)
    model = solved_network(network.model, layers, head)
    return replace(network, model=model, head=("head",), layers=layers)


def _set_head(layer: nn.Module, head: tuple[Tensor, Tensor]) -> None:
    assert isinstance(layer, nn.Linear), "evaluation_features refuses any other head"
    with torch.no_grad():
        layer.weight.copy_(head[0])
        layer.bias.copy_(head[1])
