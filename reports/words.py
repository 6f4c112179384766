"""How figures and names are written for people, and made safe for Markdown."""

import json
import re
from collections.abc import Mapping
from typing import Any

from study.config.formatting import format_duration, format_value

# What Markdown, or HTML inside it, could take for markup; an underscore only at a word's edge, and
# a list's mark only at the start.
_MARKUP = re.compile(r"([\\`*{}\[\]<>#|~$&]|(?<![^\W_])_|_(?![^\W_])|^[+-])")


def is_missing(value: Any) -> bool:
    """Say whether a cell holds nothing: None, NaN or NaT."""
    return value is None or value != value


def percent(value: Any, digits: int = 1) -> str:
    """Write a fraction as per cent."""
    return "–" if is_missing(value) else f"{100 * value:.{digits}f} %"


def percent_range(low: float, high: float, digits: int = 1) -> str:
    """Write the ends of an interval of fractions as per cent."""
    return f"{100 * low:.{digits}f} to {100 * high:.{digits}f} %"


def points(value: float) -> str:
    """Write a difference of fractions as percentage points, with its sign."""
    return f"{100 * value:+.1f}".replace("-", "−")


def duration(seconds: Any) -> str:
    """Write a duration with two units at most."""
    return "–" if is_missing(seconds) else format_duration(seconds)


def setting(value: Any) -> str:
    """Write a setting's value, a real number with three figures."""
    if isinstance(value, bool):
        return str(value).lower()
    return "–" if value != value else format_value(value)


def count(value: Any) -> str:
    """Write a whole number with its thousands set apart."""
    return "–" if is_missing(value) else f"{int(value):,}"


def moment(value: Any) -> str:
    """Write a point in time (the record keeps UTC)."""
    return "–" if is_missing(value) else f"{value:%Y-%m-%d %H:%M} UTC"


def plural(n: int, noun: str, many: str = "") -> str:
    """Write a number with its noun, whose plural ends in s unless it is given."""
    return f"{n} {noun}" if n == 1 else f"{n} {many or noun + 's'}"


def shorten(text: str, limit: int) -> str:
    """Cut the middle out of a long name; its two ends say most."""
    if len(text) <= limit:
        return text
    head = (limit - 1) // 2 + (limit - 1) % 2
    return f"{text[:head]}…{text[len(text) - (limit - 1 - head) :]}"


def markdown_text(value: Any) -> str:
    """Write a value so that Markdown shows it letter by letter, on one line."""
    line = " ".join(str(value).split())
    return _MARKUP.sub(r"\\\1", line).replace("\\<", "&lt;").replace("\\>", "&gt;")


def config_words(config: Mapping[str, Any]) -> str:
    """Write a configuration as JSON, without the path of the database it was read from."""
    study = {key: value for key, value in config.get("study", {}).items() if key != "storage"}
    return json.dumps({**config, "study": study}, indent=2, ensure_ascii=False, default=str)
