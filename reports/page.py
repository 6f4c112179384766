"""Fill the templates; every value is escaped for HTML by Jinja."""

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from reports.words import percent, shorten

_TEMPLATES = Path(__file__).parent / "templates"


def render_template(template: str, contents: dict[str, Any]) -> str:
    """Fill a template of this package."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES, encoding="utf-8"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        percent=percent, shorten=shorten, data_uri=_data_uri, script=_script
    )
    return environment.get_template(template).render(contents)


def _script(text: str) -> Markup:
    """Keep a text as it is, but for what would end the script that holds it."""
    return Markup(text.replace("</", "<\\/"))


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
