"""The best epoch on disk: weights as safetensors, and a card that says what they are."""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from core.config import Preprocessing, TrainConfig
from core.metrics import EpochMetrics, Evaluation
from core.models.layers import Mirrored, solved_network
from core.models.sources import create
from core.models.weights import WeightsError, load

WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "card.json"
REFIT_FILE = "refit.safetensors"
PREDICTIONS_FILE = "val_predictions.npz"


@dataclass(frozen=True, slots=True)
class Card:
    """What a checkpoint is, beside its weights.

    Attributes:
        backbone: torchvision name or `timm:NAME`; the weights load into that library's network
            with `len(classes)` outputs (those of a `solved_network` but for `head`, without the
            prefix `features.`).
        classes: Class names in the order of the outputs.
        metrics: The epoch whose weights these are.
        weights: Where the run's weights came from.
        layers: Nodes of the library's network, traced by torch.fx, whose pooled outputs the head
            sees side by side, as a `solved_network`; none for the network's own head.
    """

    backbone: str
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    config: TrainConfig
    metrics: EpochMetrics
    weights: str
    layers: tuple[str, ...]
    data: dict[str, str]
    versions: dict[str, str]


def save_checkpoint(folder: Path, state: dict[str, Tensor], card: Card) -> None:
    """Write weights and card; each file appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / WEIGHTS_FILE, state)
    write_json(folder / CARD_FILE, dataclasses.asdict(card))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a description for people and programs; the file appears whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    text = json.dumps(content, indent=2, ensure_ascii=False)
    partial.write_text(text + "\n", encoding="utf-8")
    os.replace(partial, path)


def save_tensors(path: Path, state: dict[str, Tensor]) -> None:
    """Write tensors by name; the file appears whole or not at all."""
    # Channels-last tensors are written in their logical order, so any layout loads them.
    plain = {name: tensor.contiguous() for name, tensor in state.items()}
    partial = path.with_name(f"{path.name}.partial")
    try:
        safetensors.torch.save_file(plain, partial, metadata={"format": "pt"})
    except safetensors.SafetensorError as err:
        partial.unlink(missing_ok=True)
        found = re.search(r"os error (\d+)", str(err))  # a full disk's or a quota's
        number = (int(found[1]),) if found else ()
        raise OSError(*number, f"{partial} cannot be written: {err}") from err
    os.replace(partial, path)


def copy_weights(checkpoint: Path, folder: Path, *, is_refitted: bool) -> None:
    """Copy a checkpoint's weights and card to a new folder; a bad one is a `WeightsError`.

    With `is_refitted` the tensors are those of its refit, the same settings fitted on all images
    but the test split. The card stays: what the settings score was measured before.
    """
    folder.mkdir()
    try:
        if is_refitted:
            state = safetensors.torch.load_file(checkpoint / WEIGHTS_FILE)
            state |= safetensors.torch.load_file(checkpoint / REFIT_FILE)
            save_tensors(folder / WEIGHTS_FILE, state)
        else:
            shutil.copyfile(checkpoint / WEIGHTS_FILE, folder / WEIGHTS_FILE)
        shutil.copyfile(checkpoint / CARD_FILE, folder / CARD_FILE)
    except (FileNotFoundError, safetensors.SafetensorError) as err:
        raise WeightsError(_unreadable(checkpoint, err)) from err


def read_card(folder: Path) -> Card:
    """Read a checkpoint's card; without one it is a `WeightsError`."""
    try:
        return TypeAdapter(Card).validate_json((folder / CARD_FILE).read_bytes())
    except (OSError, ValueError) as err:
        text = f"checkpoint {folder} has no readable {CARD_FILE} ({err}). Train the trial again."
        raise WeightsError(text) from err


def weights_hash(folder: Path) -> str:
    """Return the SHA-256 of a checkpoint's weights file, in hexadecimal digits."""
    try:
        with (folder / WEIGHTS_FILE).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as err:
        raise WeightsError(_unreadable(folder, err)) from err


def load_checkpoint(folder: Path | str) -> tuple[nn.Module, Card]:
    """Build a checkpoint's network, in eval mode, on the CPU; a bad one is a `WeightsError`."""
    folder = Path(folder)
    card = read_card(folder)
    size, n_classes = card.preprocessing.image_size, len(card.classes)
    model = create(card.backbone, size, n_classes, is_pretrained=card.weights != "none").model
    try:
        state = safetensors.torch.load_file(folder / WEIGHTS_FILE)
        if card.layers:
            head = nn.Linear(state["head.weight"].shape[1], n_classes)
            model = solved_network(model, card.layers, head)
        load(model, state)
    except (OSError, RuntimeError, LookupError, safetensors.SafetensorError) as err:
        raise WeightsError(_unreadable(folder, err)) from err
    model = Mirrored(model) if card.config.mirrored else model
    return model.eval(), card


def write_predictions(
    folder: Path,
    evaluation: Evaluation,
    paths: Sequence[str],
    out_of_fold: Evaluation | None = None,
) -> None:
    """Keep the best epoch's validation predictions beside the weights, one row an image.

    A solved head has some for the training images, too, each by the folds that lack it.
    """
    rest: dict[str, Any] = {}
    if out_of_fold is not None:  # there may be many, and only their mean counts
        half = np.exp(out_of_fold.log_probs).astype(np.float16)
        rest = {"train_labels": out_of_fold.labels, "train_probabilities": half}
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        folder / PREDICTIONS_FILE,
        paths=np.array(paths, dtype=np.str_),
        labels=evaluation.labels,
        predicted=evaluation.predicted,
        probabilities=np.exp(evaluation.log_probs),  # (N, K), float32
        **rest,
    )


def _unreadable(folder: Path, err: Exception) -> str:
    return f"checkpoint {folder / WEIGHTS_FILE} cannot be read ({err}). Train the trial again."


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint, whole or cut short; a user's own files in it stay, and links do."""
    if folder.is_symlink():
        return
    for name in (WEIGHTS_FILE, CARD_FILE, REFIT_FILE, PREDICTIONS_FILE):
        for file in (folder / name, folder / f"{name}.partial"):
            file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # it is not empty, or not there
        folder.rmdir()
