"""The frame of a page: style sheet, script, header and footer, in one file without network."""

import os
from contextlib import suppress
from datetime import UTC, datetime
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from uuid import uuid4

from pipeline.errors import StorageError


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
    """Write a page, complete or not at all, whoever else writes it; returns its path.

    Raises `StorageError` where it cannot be written.
    """
    if path.is_dir():
        raise StorageError(f"{path} is a folder; name the file that the page goes to")
    # A name of its own, because two processes may write the same page at once.
    partial = path.with_name(f".{uuid4().hex}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(page, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise StorageError(
            f"{path} could not be written ({error.strerror or error}); name a file, by -o, in a "
            "folder that can be written to and has room"
        ) from error
    return path
