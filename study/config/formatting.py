"""How values are written for people, and for programs as JSON."""

import dataclasses
import json
import math
import re
import shlex
from collections.abc import Mapping

from pydantic_core import to_jsonable_python

from core.config import TrainConfig
from study.config.search_space import ParamValue


def format_accuracy(value: float | None) -> str:
    """Write a fraction as per cent."""
    return "-" if value is None or math.isnan(value) else f"{100 * value:.1f} %"


def format_duration(seconds: float | None) -> str:
    """Write a duration with two units at most."""
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def format_value(value: ParamValue) -> str:
    """Write a setting's value, a real number with three figures."""
    if isinstance(value, float):
        return f"{value:.3g}"
    return "none" if value is None else str(value)


def format_params(params: Mapping[str, ParamValue]) -> str:
    """Write a trial's settings in one line."""
    return ", ".join(f"{name}={format_value(value)}" for name, value in params.items())


def short_backbone(name: str) -> str:
    """Write a backbone's name without its library, and the mark of weights from TensorFlow."""
    return name.removeprefix("timm:").removeprefix("tf_")


def describe_trial(origin: str, params: Mapping[str, ParamValue]) -> str:
    """Say in a line what a trial is: where it comes from, and the settings that differ.

    Left out are those at their default, and the freeze level where a plan has said it.
    """
    what = origin.removeprefix("plan: ")
    defaults = dataclasses.asdict(TrainConfig())
    shown = []
    for name, value in params.items():
        if name == "backbone":
            shown.append(short_backbone(str(value)))
        elif name == "freeze_depth":
            shown += [f"level {value}"] if what == origin else []
        elif value != defaults.get(name):
            shown.append(f"{name}={format_value(value)}")
    return f"{what}: {', '.join(shown)}" if shown else what


def json_text(value: object) -> str:
    """Write a value as one line of JSON; no number that is not finite, no password."""
    plain = to_jsonable_python(value, inf_nan_mode="null", fallback=str)
    return hide_password(json.dumps(plain, ensure_ascii=False))


def hide_password(text: str) -> str:
    """Blank out what may be secret in every database URL of a text: texts are passed on.

    That is the password, which may hold blanks, and all options: drivers take passwords, keys and
    files of them under many names, which may be percent-encoded.
    """
    text = re.sub(r"""(\w://[^\s:@/]*):[^@\n"]*@([^\s"@]*@)*""", r"\1:***@", text)
    return re.sub(r"""(\w://[^\s?"]*)\?[^\s"]*""", r"\1?***", text)


def study_command(command: str, name: str, storage: str, *flags: str) -> str:
    """Return a command, about a study if named, ready to be pasted but for a password."""
    words = ["python -m study", command, *([shlex.quote(name)] if name else [])]
    if storage != "studies.db":
        words += ["--storage", shlex.quote(hide_password(storage))]
    return " ".join([*words, *flags])
