"""A hook of mkdocs: pages that are made from the code, and those that stand outside docs/."""

import inspect
import re
from pathlib import Path
from typing import Any

import click
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OUTSIDE = {
    "index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"
}  # fmt: skip


def on_files(files: Files, config: Any) -> Files:
    """Add the pages."""
    made = {target: moved((ROOT / name).read_text("utf-8")) for target, name in OUTSIDE.items()}
    made |= {
        "reference-commands.md": commands(),
        "reference-configuration.md": configuration(),
        "reference-python.md": python_names(),
    }
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(text: str, page: Any, config: Any, files: Files) -> str:
    """Let links of docs/ to files outside it lead to their pages."""
    return text.replace("](../benchmarks/README.md)", "](performance.md)")


def moved(text: str) -> str:
    """Let links be those of a page that stands in docs/."""
    for target, name in OUTSIDE.items():
        text = text.replace(f"]({name})", f"]({target})")
    return re.sub(r"\]\(docs/", "](", text)


def commands() -> str:
    """Return the help of every command."""
    from study.cli.main import cli

    parts = ["# Commands\n"]
    for name, command in cli.commands.items():
        context = click.Context(command, info_name=f"python -m study {name}", max_content_width=99)
        parts.append(f"## {name}\n\n```text\n{command.get_help(context)}\n```\n")
    return "\n".join(parts)


def configuration() -> str:
    """Return the commented configuration that `study init` writes."""
    text = (ROOT / "configs" / "default.toml").read_text("utf-8")
    head = "Every key with its meaning and its default, as `python -m study init` writes it."
    return f"# Configuration\n\n{head}\n\n```toml\n{text}\n```\n"


def python_names() -> str:
    """Return signature and docstring of every public name."""
    import frostline

    parts = ["# Python\n\n`import frostline` gives these names.\n"]
    for name in frostline.__all__:
        found = getattr(frostline, name)
        doc = inspect.getdoc(found) or ""
        shown = "" if inspect.isclass(found) else str(inspect.signature(found))
        parts.append(f"## {name}\n\n```text\n{name}{shown}\n\n{doc}\n```\n")
    return "\n".join(parts)
