"""The figures of an ablation: drawn for the page and for a paper, or why they are not."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from reports.style import style

# A column of a two-column page is about 85 mm; at this width 9-point type is still readable there.
_WIDTH, _HEIGHT = 4.6, 3.1
_DPI = 220

# What a file would say of when and by what it was written.
_UNSTABLE = {"svg": ("Date",), "png": ("Software",), "pdf": ("CreationDate", "Producer")}

Draw = Callable[[Axes], Any]


@dataclass(frozen=True, slots=True)
class Drawing:
    """One figure of the report.

    Attributes:
        name: Of its files, without suffix.
        title: What it shows.
        caption: How to read it.
        svg: For the page; empty where `why_empty` says why.
        png: For a slide; empty where none is wanted.
        pdf: For a paper; empty where none is wanted.
        why_empty: One sentence, or None.
    """

    name: str
    title: str
    caption: str
    svg: bytes = b""
    png: bytes = b""
    pdf: bytes = b""
    why_empty: str | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """A figure to be drawn; what it needs is checked before."""

    name: str
    title: str
    caption: str
    draw: Draw
    why_empty: str | None = None
    size: tuple[float, float] = (_WIDTH, _HEIGHT)
    is_for_paper: bool = False


def render(draw: Draw, size: tuple[float, float], kind: str) -> bytes:
    """Draw on fresh axes and return the file's bytes; the same data give the same bytes.

    Args:
        draw: Draws on the axes.
        size: Width and height, inches.
        kind: `png`, `svg` or `pdf`.
    """
    with style():
        figure = Figure(figsize=size, dpi=_DPI)
        FigureCanvasAgg(figure)
        draw(figure.add_subplot())
        buffer = io.BytesIO()
        metadata: Any = dict.fromkeys(_UNSTABLE[kind])
        figure.savefig(buffer, format=kind, metadata=metadata)
    return buffer.getvalue()


def save_figures(drawings: Sequence[Drawing], folder: Path) -> tuple[Path, ...]:
    """Write each figure's files; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for drawing in drawings:
        forms = ((".svg", drawing.svg), (".png", drawing.png), (".pdf", drawing.pdf))
        for suffix, content in forms:
            path = folder / f"{drawing.name}{suffix}"
            if drawing.why_empty is not None or not content:
                path.unlink(missing_ok=True)  # of an earlier report of this study
                continue
            path.write_bytes(content)
            paths.append(path)
    return tuple(paths)


def drawn(plan: Plan) -> Drawing:
    """Draw a figure in all its forms."""
    if plan.why_empty is not None:
        return Drawing(plan.name, plan.title, plan.caption, why_empty=plan.why_empty)
    return Drawing(
        plan.name,
        plan.title,
        plan.caption,
        svg=render(plan.draw, plan.size, "svg"),
        png=render(plan.draw, plan.size, "png") if plan.is_for_paper else b"",
        pdf=render(plan.draw, plan.size, "pdf") if plan.is_for_paper else b"",
    )
