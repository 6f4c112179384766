"""A model to use: one network, or several whose probabilities are averaged, in one folder.

The folder holds `model.json` and one checkpoint folder per member. A checkpoint alone is a model
of one member.
"""

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from core.config import Preprocessing
from core.data.decode import Raw, UInt8Array, eval_view
from core.metrics import FloatArray
from core.models.weights import WeightsError
from core.training.batches import Normalizer, in_order
from core.training.checkpoint import (
    CARD_FILE,
    REFIT_FILE,
    copy_weights,
    load_checkpoint,
    read_card,
    remove_checkpoint,
    weights_hash,
    write_json,
)

MODEL_FILE = "model.json"
_BATCH = 16


@dataclass(frozen=True, slots=True)
class Member:
    """One network of a model, in eval mode.

    Attributes:
        weight: Its share of the mean; those of all members add up to 1.
        temperature: What its logits are divided by.
    """

    network: nn.Module
    preprocessing: Preprocessing
    weight: float = 1.0
    temperature: float = 1.0


@dataclass(frozen=True, slots=True)
class Model:
    """A classifier of images; its classes are in the order of the probabilities."""

    classes: tuple[str, ...]
    members: tuple[Member, ...]

    @torch.inference_mode()
    def predict(self, images: Sequence[Raw | str]) -> FloatArray:
        """Return the probabilities of each class, (N, K), for files, their contents or images.

        Raises:
            OSError: One is no image, or a damaged one; says which.
            TypeError: A single file is given instead of a list.
            ValueError: One has more than 8 bits, and no image of the training data had.
        """
        if isinstance(images, (str, bytes, Path)):
            raise TypeError("images must be a list, also of one file: predict([file])")
        found = np.zeros((len(images), len(self.classes)), dtype=np.float32)
        for member in self.members:
            device = next(member.network.parameters()).device
            normalize = Normalizer(member.preprocessing, device)
            for positions in in_order(len(images), _BATCH):
                views = [_view(images[i], member.preprocessing) for i in positions.tolist()]
                inputs = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2)
                logits = member.network(normalize(inputs)).float() / member.temperature
                found[positions] += member.weight * logits.softmax(1).cpu().numpy()
        return found


def _view(image: Raw | str, shown: Preprocessing) -> UInt8Array:
    """Return an image's evaluation view; an error names the file."""
    source = Path(image) if isinstance(image, str) else image
    try:
        return eval_view(source, shown)
    except (OSError, ValueError) as err:
        name = source if isinstance(source, Path) else "an image"
        if isinstance(err, ValueError):
            raise ValueError(f"{name}: {err}") from err
        raise OSError(f"{name} cannot be read as an image: {err.strerror or err}") from err


def model_hash(folder: Path) -> str | None:
    """Return the SHA-256 of a model's description, which names its weights; None without one."""
    try:
        return hashlib.sha256((folder / MODEL_FILE).read_bytes()).hexdigest()
    except OSError:
        return None


def described(folder: Path) -> dict[str, Any]:
    """Return what `model.json` says; nothing where there is none that can be read."""
    try:
        found = json.loads((folder / MODEL_FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def remove_model(folder: Path) -> None:
    """Remove a model, and nothing else from its folder."""
    for member in _member_folders(folder):
        remove_checkpoint(member)
    (folder / MODEL_FILE).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # it is not empty, or not there
        folder.rmdir()


def load_model(folder: Path | str) -> Model:
    """Load a model, or a checkpoint as a model of one member, on the CPU.

    Raises:
        WeightsError: It is missing or damaged.
    """
    folder = Path(folder)
    if not (folder / MODEL_FILE).exists() and (folder / CARD_FILE).exists():
        network, card = load_checkpoint(folder)
        return Model(card.classes, (Member(network, card.preprocessing),))
    try:
        found: dict[str, Any] = json.loads((folder / MODEL_FILE).read_bytes())
        rows = [
            (m["folder"], float(m["weight"]), float(m["temperature"]), m["weights_hash"])
            for m in found["members"]
        ]
        classes = tuple(found["classes"])
    except (OSError, ValueError, LookupError, TypeError) as err:
        raise WeightsError(f"model {folder} has no readable {MODEL_FILE} ({err}).") from err
    members = []
    for name, weight, temperature, own_hash in rows:
        if weights_hash(folder / name) != own_hash:
            text = f"model {folder}: {name} holds other weights than {MODEL_FILE} says."
            raise WeightsError(f"{text} Continue the study, which writes it again.")
        network, card = load_checkpoint(folder / name)
        members.append(Member(network, card.preprocessing, weight, temperature))
    return Model(classes, tuple(members))


def save_model(
    folder: Path,
    members: Sequence[tuple[Path, float, float]],
    facts: dict[str, Any],
    *,
    use_refits: bool = True,
) -> None:
    """Write a model; whoever loads it meanwhile gets the old one or the new one whole.

    The folders of the model before stay until the next one, for whoever is reading them.

    Args:
        folder: Where to; the model that it holds is replaced.
        members: Checkpoint folder, weight and temperature of each.
        facts: What else `model.json` says.
        use_refits: Whether members have the tensors of their refit where there is one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    before = {int(path.name[7:]): path for path in _member_folders(folder)}
    first = max(before, default=-1) + 1
    rows = []
    for k, (checkpoint, weight, temperature) in enumerate(members, start=first):
        target = folder / f"member-{k}"
        is_refitted = use_refits and (checkpoint / REFIT_FILE).exists()
        copy_weights(checkpoint, target, is_refitted=is_refitted)
        row = {"folder": target.name, "weight": weight, "temperature": temperature}
        rows.append({**row, "is_refitted": is_refitted, "weights_hash": weights_hash(target)})
    classes = read_card(members[0][0]).classes
    read_now = {row["folder"] for row in described(folder).get("members", ())}
    write_json(folder / MODEL_FILE, {"classes": classes, "members": rows, **facts})
    for path in before.values():
        if path.name not in read_now:
            remove_checkpoint(path)


def _member_folders(folder: Path) -> list[Path]:
    """Return the folders that members have or had; one of a user's is called otherwise."""
    return [path for path in folder.glob("member-*") if path.name[7:].isdecimal()]
