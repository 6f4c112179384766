"""A head that is solved: logistic regression on what the frozen network makes of the images."""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from core.cache import ArrayCache
from core.config import TrainConfig
from core.data.draws import IntArray
from core.data.partition import partition
from core.data.splits import ImageData
from core.device import peak_memory_bytes
from core.heads.solver import solve_head
from core.metrics import EpochMetrics, Evaluation
from core.models.builder import Network
from core.training.activations import evaluation_features

_FOLDS = 5


def solve_layer(network: Network, config: TrainConfig, data: ImageData, features: Tensor) -> None:
    """Set a network's head to the logistic regression on features, (N, F), of `data.train`.

    It depends on the features and `head_decay` alone: on no seed, and on no other option.
    """
    labels = data.train.labels
    folds = partition(labels.tolist(), data.train.contents, _FOLDS, 0)
    layer = network.model.get_submodule(network.head[0])
    assert isinstance(layer, nn.Linear), "evaluation_features refuses any other head"
    device = layer.weight.device
    solved = solve_head(
        features.to(device),
        torch.from_numpy(labels).to(device),
        len(data.classes),
        torch.from_numpy(folds),
        None if config.head_decay == "auto" else [config.head_decay],
    )
    with torch.no_grad():
        layer.weight.copy_(solved.weight)
        layer.bias.copy_(solved.bias)


def fit_solved(
    network: Network,
    config: TrainConfig,
    data: ImageData,
    cache: ArrayCache,
    pulse: Callable[[], None],
) -> tuple[EpochMetrics, Evaluation]:
    """Solve a network's head and evaluate it, as the one epoch of its run."""
    begin = time.perf_counter()
    saved_s, hits, misses = cache.saved_s, cache.hits, cache.misses
    train, val = evaluation_features(network, config, data, cache, pulse)
    solving = time.perf_counter()
    solve_layer(network, config, data, train)
    solved = time.perf_counter()
    fitted = _evaluate(network, train, data.train.labels)
    evaluation = _evaluate(network, val, data.val.labels)
    device = next(network.model.parameters()).device
    metrics = EpochMetrics(
        epoch=1,
        train_loss=fitted.loss,
        val_loss=evaluation.loss,
        val_acc=evaluation.acc,
        val_balanced_acc=evaluation.balanced_acc,
        val_macro_f1=evaluation.macro_f1,
        base_lr=0.0,
        head_lr=0.0,
        images_per_s=len(data.train) / (solved - begin),
        data_s=solving - begin,
        train_s=solved - solving,
        eval_s=time.perf_counter() - solved,
        peak_memory_bytes=peak_memory_bytes(device),
        micro_batch_size=config.micro_batch_size or config.batch_size,
        is_best=True,
        saved_s=cache.saved_s - saved_s,
        cache_hits=cache.hits - hits,
        cache_misses=cache.misses - misses,
        score=evaluation.score(config.monitor),
    )
    return metrics, evaluation


@torch.no_grad()
def _evaluate(network: Network, features: Tensor, labels: IntArray) -> Evaluation:
    layer = network.model.get_submodule(network.head[0])
    log_probs = layer(features.to(next(layer.parameters()).device)).log_softmax(dim=1)
    return Evaluation(labels, log_probs.float().cpu().numpy())
