"""Every command that README.md and the documentation show is run, on few and small images.

Long ones get options that shorten them; placeholders become names of the studies that are there.
"""

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from command_line import study, without_figures
from study.config.load import parse_config
from support import ROOT, make_folder

PAGES = ("README.md", *(f"docs/{name}.md" for name in ("usage", "reports", "ablation", "results")))
SMALL = "--trials 1 --set train.epochs=1 --set train.image_size=32 --set data.cache_dir=cache "
SMALL += "--set train.batch_size=8 --set space.backbone=timm:tf_efficientnet_lite0"
# The first rule whose text is in a command says what is appended to it.
SHORTER = {
    "run --config": f"--data photos --name configured {SMALL}",
    "run --data": f"{SMALL} --set space.freeze_depth=3",
    "study run": f"{SMALL} --set data.limit=60",
    "--factor": "--replicates 1 --folds 1",
    "ablate photos-ablation": "",
    "ablate study.toml": "--dry-run --name from-a-file",
    "study ablate": "--dry-run",
    "study delete": "--yes",
}
ABLATIONS = ("pets-ablation", "hotdog-ablation", "ants-ablation", "d2l-hotdog-ablation")
NAMES = dict.fromkeys(("NAME", "STUDY", "PATH", "DATA/hotdog", "DATA/hymenoptera"), "photos")
NAMES |= dict.fromkeys(ABLATIONS, "photos-ablation") | {"7": "0"}
SERVED = ("dashboard",)  # until it is interrupted; test_main.py opens it


def commands() -> list[str]:
    """Return the commands of all pages in their order, each once, without `python -m study`."""
    found = []
    for page in PAGES:
        text = (ROOT / page).read_text("utf-8")
        pairs = re.findall(r"^python -m study ([^#\n]+)|`python -m study ([^`\n]+)`", text, re.M)
        found += ["".join(pair) for pair in pairs]
        for table in re.findall(r"^## Commands\n(.*?)^## ", text, re.M | re.S):
            cells = re.findall(r"^\| (`.*?) \|", table, re.M)
            found += [text for cell in cells for text in re.findall(r"`([^`]+)`", cell)]
    texts = (" ".join(text.split()) for text in found)
    return [text for text in dict.fromkeys(texts) if "..." not in text and text != "ablate"]


@pytest.mark.parametrize("page", PAGES)
def test_configurations_of_the_documentation_load(page: str) -> None:
    for block in re.findall("```toml\n(.*?)```", (ROOT / page).read_text("utf-8"), re.S):
        parse_config(tomllib.loads(block), page)


@pytest.mark.slow
def test_commands_of_the_documentation_run(tmp_path: Path) -> None:
    make_folder(tmp_path / "photos", {"red": 120, "blue": 120})
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    todo = commands()
    assert len(todo) > 25
    done = set()
    for text in sorted(todo, key=lambda text: text.startswith("delete")):  # that one at the end
        own = text.replace("backbones NAME", "backbones resnet18")
        words = [NAMES.get(word, word) for word in shlex.split(own)]
        if words[0] in SERVED or tuple(words) in done:
            continue
        done.add(tuple(words))
        more = next((more for rule, more in SHORTER.items() if rule in f"study {text}"), "")
        with without_figures():
            study(tmp_path, *words, *shlex.split(more))
