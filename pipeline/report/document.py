"""The frame of a page: style sheet, script, header and footer, in one file without network."""

import os
from datetime import UTC, datetime
from html import escape
from importlib import resources
from pathlib import Path
from string import Template


def document(name: str, description: str, header: str, body: str) -> str:
    """A whole page as text. `name` and `description` are plain text, the others HTML."""
    room = resources.files("pipeline.report")
    template = Template(room.joinpath("page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(f"{name} - longtail"),
        name=escape(name),
        description=f"<p>{escape(description)}</p>" if description else "",
        header=header,
        body=body,
        script=room.joinpath("page.js").read_text(encoding="utf-8"),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def publish(path: Path, page: str) -> Path:
    """Write a page, complete or not at all; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, path)
    return path
