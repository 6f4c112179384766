import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from core.config import TrainConfig
from core.keys import key_text, prefix_key, source_digest
from core.models.builder import build
from core.models.partition import cut

CORE = Path(__file__).parents[2] / "core"
BASE = TrainConfig(backbone="timm:test_resnet", weights="none", image_size=32, freeze_depth=4)


def test_a_change_in_any_folder_of_core_changes_the_digest(tmp_path: Path) -> None:
    copy = tmp_path / "core"
    shutil.copytree(CORE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    before = source_digest(copy)
    assert before == source_digest(CORE)
    folders = {path.parent for path in copy.rglob("*.py")}
    assert len(folders) > 1
    seen = {before}
    for folder in folders:
        with open(next(folder.glob("*.py")), "a") as file:
            file.write("\n")
        seen.add(source_digest(copy))
    assert len(seen) == 1 + len(folders)


def _key(**settings: Any) -> str:
    config = replace(BASE, **settings)
    network = build(config, ("a", "b"))
    with torch.no_grad():  # what is trained does not count
        network.model.get_parameter("fc.weight").add_(1)
    part = cut(network, config)
    assert part is not None
    return prefix_key(config, network, torch.device("cpu"), part.make_prefix)


def test_a_key_names_frozen_weights_and_nothing_that_is_trained() -> None:
    assert _key() == _key() == _key(base_lr=0.5, batch_size=7, head_init="zero")
    others = [
        {"freeze_depth": 5},
        {"seed": 1},
        {"image_size": 48},
        {"normalize": "none"},
        {"amp": "bf16"},
    ]
    assert len({_key(), *(_key(**other) for other in others)}) == 1 + len(others)


def test_a_key_holds_no_object_whose_text_differs_between_processes() -> None:
    assert key_text((1, "a", None, (2.5, True))) == "(1,'a',None,(2.5,True))"
    with pytest.raises(TypeError, match="but got a object"):
        key_text((object(),))
