"""Fill the templates: HTML is escaped by Jinja, Markdown value by value."""

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from reports.publish import to_markdown
from reports.words import markdown_table, markdown_text, percent, percent_range, shorten

_TEMPLATES = Path(__file__).parent / "templates"


class _Markdown(str):
    """Text that is Markdown already and is not to be escaped."""


def render_template(template: str, contents: dict[str, Any]) -> str:
    """Fill a template of this package; its suffix says whether it is HTML."""
    is_html = template.endswith(".html")
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES, encoding="utf-8"),
        autoescape=is_html,
        # Every value of the Markdown template is escaped unless it is marked as Markdown.
        finalize=None if is_html else _escaped,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        percent=percent,
        interval=lambda told: percent_range(told.low, told.high),
        shorten=shorten,
        data_uri=_data_uri,
        table=lambda table: _Markdown(markdown_table(table.header, table.rows)),
        published=lambda grid: _Markdown(to_markdown(grid)),
        md=_Markdown,
        file=lambda name: _Markdown(f"figures/{name}.png"),
        code=lambda text: _Markdown("\n".join(f"    {line}" for line in str(text).splitlines())),
    )
    return environment.get_template(template).render(contents)


def _escaped(value: Any) -> str:
    return value if isinstance(value, _Markdown) else markdown_text(value)


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
