"""Configurations as TOML text: read, and written with comments."""

import json
import re
import stat
import textwrap
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from core.config import fields_of
from study.config.errors import ConfigError
from study.config.study_config import SECTIONS, StudyConfig, default_name

# Room for "# " within the width of an editor's usual 99 columns.
_COMMENT_WIDTH = 92
# Far more than a configuration needs: a larger file is something else. Assumption.
_MOST_BYTES = 2**20
DEMO = Path(__file__).with_name("demo.toml")
"""The configuration of the demo."""
_HEAD = """\
# A Frostline study. Every key may be left out: what stands here is what it then is.
# Run it: python -m study run --config FILE

"""


def read_file(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        ConfigError: It cannot be read or is not TOML.
    """
    text = f"must be a file, of at most {_MOST_BYTES} bytes."
    try:
        found = path.stat()
        if stat.S_ISREG(found.st_mode) and found.st_size <= _MOST_BYTES:
            return tomllib.loads(path.read_bytes().decode("utf-8-sig"))  # some editors add a BOM
    except FileNotFoundError:
        text = "there is no such file; `python -m study init` writes one."
    except OSError as err:
        text = f"cannot be read: {err.strerror}."
    except RecursionError:
        text = "must be TOML, but its tables and lists are nested too deep."
    except ValueError as err:  # also a number of more digits than Python reads
        text = f"must be TOML, but {str(err)[0].lower()}{str(err)[1:].split(';')[0].rstrip('.')}."
    raise ConfigError(f"{path}: {text}")


def read_value(text: str) -> object:
    """Read a value as TOML, and as a text where it is none."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


def config_text(config: StudyConfig, *, with_help: bool = False) -> str:
    """Write a configuration as TOML that `load_config` reads back to the same, but a password.

    With help it says what each key means, as the study.toml of `python -m study init` does.
    """
    sections = [_section(name, config, with_help) for name in SECTIONS]
    blocks = ["\n".join(lines) for lines in (*sections, _space(config, with_help))]
    return (_HEAD if with_help else "") + "\n\n".join(blocks) + "\n"


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


def _section(name: str, config: StudyConfig, with_help: bool) -> Iterator[str]:
    section, values = SECTIONS[name], config.to_record()[name]
    if with_help:
        yield from _comment(section.__doc__.splitlines()[0])
    yield f"[{name}]"
    for key, field in fields_of(section).items():
        if with_help:
            yield ""
            yield from _comment(field.description or "")
        value = values.get(key)
        if name == "train" and key in config.space:
            yield f"# {key} is searched: see [space]."
        elif value is None and field.default is None:
            yield f"# {key} ="
        elif with_help and key == "name" and value == default_name(config.data.source):
            yield f"# {key} = {toml_value(value)}"  # left out, it follows the data
        else:
            yield f"{key} = {toml_value(value)}"


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
