"""Which checkpoints exist: `step_00001200/manifest.json`, written last, decides (free of torch).

A checkpoint directory counts only when every file that its manifest names has the size and the
sha256 that stand there. Anything else is a save that did not finish, or damage.
"""

import hashlib
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from pipeline.errors import RecipeError, StorageError
from pipeline.recipe import Recipe
from pipeline.training.space import with_room
from pipeline.training.whereabouts import here

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
AVERAGED = "averaged.safetensors"
OPTIMIZER = "optimizer.safetensors"
DETECTOR_FILES = (WEIGHTS, AVERAGED)
"""All that a detector is loaded from."""
METADATA = "longtail"
"""Key of a safetensors header under which a detector in one file has its manifest."""
ONE_FILE = ".safetensors"
"""Suffix of a detector in one file, whose header has the manifest in the place of the folder."""
CHECKPOINT_NAME = re.compile(r"^step_(\d{8,})$")

HARMLESS_KEYS = (
    "description",
    "output",
    "data.root",
    "data.shards",
    "data.workers",
    "data.reading",
    "data.bad_sample_budget",
    "data.validation",
    "data.transforms.evaluation_short_side",
    "data.transforms.evaluation_max_side",
    "teacher.placement",
    "teacher.actors",
    "teacher.gpus_per_actor",
    "teacher.cpus_per_actor",
    "teacher.batches_ahead",
    "detector.kernel",
    "detector.backbone.checkpointed_stages",
    "training.micro_batch",
    "training.activation_checkpointing",
    "training.log_every",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.max_skipped_steps",
    "training.zero_stage",
    "training.offload",
    "evaluation",
    "logging",
    "cluster",
)
"""Recipe keys (or sections) that do not change what is learnt but for rounding and padding: global
batches, and what losses are divided by, stay. The data itself is compared by the digests in the
plan state, so its place may move."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself; `files` maps a name to its bytes and sha256.

    `consumed` counts what was trained on up to it: `samples` by source, `instances` (labelled
    boxes) by frequency group. `unreadable` has the images that could not be read until then, with
    their reasons, for the budget holds over the whole run.
    """

    step: int
    skipped_steps: int
    plan: dict[str, Any]
    recipe_hash: str
    recipe: dict[str, Any]
    vocabulary_digest: str
    vocabulary: Any
    consumed: dict[str, dict[str, int]]
    versions: dict[str, str]
    world_size: int
    files: dict[str, dict[str, Any]]
    unreadable: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """Text of manifest.json."""
        return json.dumps(asdict(self), indent=1)


def checkpoints_dir(run_dir: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run_dir / "checkpoints"


def checkpoint_dir(run_dir: Path, step: int) -> Path:
    """Directory of the checkpoint taken after `step` steps."""
    return checkpoints_dir(run_dir) / f"step_{step:08d}"


def file_digest(path: Path) -> dict[str, Any]:
    """Bytes and sha256 of a file, as a manifest states them."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def read_manifest(directory: Path) -> Manifest:
    """The manifest as it is written, without looking at the files; raises `StorageError`.

    `directory` may be a detector in one file.
    """
    path = directory if is_one_file(directory) else directory / MANIFEST
    try:
        tree = json.loads(_header(path) if path == directory else path.read_text(encoding="utf-8"))
        # Manifests were written before there were ledgers in them.
        tree = {"unreadable": {}, **tree}
        return Manifest(**{part.name: tree[part.name] for part in fields(Manifest)})
    except FileNotFoundError:
        raise StorageError(f"{directory} has no {MANIFEST}: the save did not finish") from None
    except OSError as error:
        raise StorageError(f"{path} could not be read: {error}") from error
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise StorageError(f"{path} is damaged: {error!r}") from None


def is_one_file(path: Path) -> bool:
    """Whether a path is that of a detector in one file, rather than of a checkpoint folder."""
    return path.suffix == ONE_FILE and path.is_file()


def _header(path: Path) -> str:
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise StorageError(f"{path} could not be read: {error}") from error
    if METADATA not in metadata:
        raise StorageError(
            f"{path} holds tensors without a manifest, so it is not known what model they are of; "
            "public weights are read by `longtail import-checkpoint`"
        )
    return metadata[METADATA]


def verify(directory: Path, files: Collection[str] | None = None) -> Manifest:
    """The manifest, after each file was found with its size and sha256; raises `StorageError`.

    With `files`, those of them that the manifest names are looked at, and no others.
    """
    manifest = read_manifest(directory)
    # One file names no others: its header states where each tensor ends, and that was read.
    for name, stated in manifest.files.items():
        if files is not None and name not in files:
            continue
        path = directory / name
        try:
            _compare(path, stated)
        except OSError as error:
            raise StorageError(f"{path} could not be read: {error}") from error
    return manifest


def _compare(path: Path, stated: Mapping[str, Any]) -> None:
    if not path.is_file():
        raise StorageError(f"{path} is missing, and the manifest names it")
    size = path.stat().st_size
    if size != stated["bytes"]:
        raise StorageError(f"{path} has {size} bytes, the manifest says {stated['bytes']}")
    here.move()
    if file_digest(path)["sha256"] != stated["sha256"]:
        raise StorageError(f"{path} has another sha256 than the manifest says")


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoint directories by name, oldest first, verified or not; raises `StorageError`."""
    root = checkpoints_dir(run_dir)
    try:
        found = [path for path in root.iterdir() if CHECKPOINT_NAME.match(path.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise StorageError(f"{root} could not be read: {error}") from error
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def newest_verified(run_dir: Path, files: Collection[str] | None = None) -> Path | None:
    """The newest checkpoint that verifies, or None where the run has none at all.

    One that does not verify is named in a warning and the next older one is taken; raises
    `StorageError` when there are some and none verifies. `files` are those of `verify`.
    """
    candidates = list_checkpoints(run_dir)
    for directory in reversed(candidates):
        try:
            verify(directory, files)
        except StorageError as error:
            logger.warning("checkpoint left out: %s", error)
        else:
            return directory
    if candidates:
        raise StorageError(
            f"none of the {len(candidates)} checkpoints in {checkpoints_dir(run_dir)} verifies "
            "(the warnings above say why); remove that directory to start this stage over"
        )
    return None


def publish(
    directory: Path,
    manifest: Manifest,
    write: Callable[[Path], None],
    *,
    replace: bool = False,
) -> None:
    """Write a checkpoint so that it is there whole or not at all.

    `write` puts the files into the directory that it is given. They are flushed to disk, then the
    manifest with their digests is written, then one rename makes the checkpoint visible. With
    `replace` it takes the place of a checkpoint of this name. Raises `StorageError`.
    """
    partial = unfinished(directory)
    try:
        partial.mkdir(parents=True)
        write(partial)
        for path in sorted(partial.iterdir()):
            here.move()
            _flush(path)
            here.move()
            manifest.files[path.name] = file_digest(path)
        _write_whole(partial / MANIFEST, manifest.to_json())
        _flush(partial)
        if replace and directory.exists():
            _discard(directory)
        partial.rename(directory)
        _flush(directory.parent)
    except OSError as error:
        raise StorageError(
            f"checkpoint {directory} could not be written: {error}; older checkpoints are intact. "
            "Free some space and run the same command again"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def unfinished(path: Path) -> Path:
    """A hidden name beside `path` that nothing has, for what becomes `path` when it is whole."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def keep_newest(run_dir: Path, count: int, saved: Path | None = None) -> None:
    """Remove all but the `count` newest checkpoints, and what is unfinished.

    Those that wait for their evaluation stay; those of later steps than `saved` go.
    """
    waiting = waiting_for_evaluation(run_dir)
    checkpoints = list_checkpoints(run_dir)
    if saved is not None:
        # Later ones are damaged, or the run would have gone on from there: they must not push out
        # the one that was saved now.
        for directory in checkpoints[checkpoints.index(saved) + 1 :]:
            _discard(directory)
        checkpoints = checkpoints[: checkpoints.index(saved) + 1]
    for directory in checkpoints[:-count]:
        if directory not in waiting:
            _discard(directory)
    remove_unfinished(run_dir)


def remove_unfinished(run_dir: Path) -> None:
    """Remove what saves and removals left that were killed; for who holds the run directory."""
    for pattern in (".step_*.tmp", "step_*.tmp"):
        for leftover in checkpoints_dir(run_dir).glob(pattern):
            shutil.rmtree(leftover)


def request_evaluation(directory: Path) -> None:
    """Mark a checkpoint, until `evaluation_done`, as one that waits for its evaluation."""
    mark = _request(directory)

    def write() -> None:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()

    with_room(mark, 0, write)


def evaluation_done(directory: Path) -> None:
    """The checkpoint need not be kept for its evaluation any longer."""
    _request(directory).unlink(missing_ok=True)


def waiting_for_evaluation(run_dir: Path) -> list[Path]:
    """Checkpoints that wait for their evaluation, oldest first."""
    return [directory for directory in list_checkpoints(run_dir) if _request(directory).exists()]


def _request(directory: Path) -> Path:
    return directory.with_name(directory.name + ".evaluate")


def write_atomically(path: Path, text: str) -> None:
    """Write a small file, with its folder: the old one or the new one is there at any time, never a
    part.

    On a disk that is full or fails see `with_room`.
    """

    def write() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_whole(path, text)

    with_room(path, len(text), write)


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".tmp")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)


def refuse_another_recipe(directory: Path, recipe: Recipe) -> None:
    """Raise `RecipeError` when a run was started by a recipe that would have learnt otherwise."""
    changed = learnt_otherwise(read_manifest(directory).recipe, recipe)
    if changed:
        raise RecipeError(
            f"{recipe.run_dir} was started by another recipe: {'; '.join(changed)}. Give this "
            f"recipe a new name, or remove {recipe.run_dir} to start it over"
        )


def learnt_otherwise(before: Mapping[str, Any], recipe: Recipe) -> list[str]:
    """Where a recipe differs from the one before in what changes what is learnt."""
    old, new = _flatten(before), _flatten(recipe.model_dump(mode="json"))
    return [
        f"{key} was {old.get(key, 'absent')!r} and is {new.get(key, 'absent')!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not _harmless(key)
    ]


def _harmless(key: str) -> bool:
    return any(key == harmless or key.startswith(harmless + ".") for harmless in HARMLESS_KEYS)


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key; lists are values, so that a shift shows as one change."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _discard(directory: Path) -> None:
    """Remove a checkpoint; the rename first, so that a kill leaves no half of it behind."""
    partial = directory.with_name(directory.name + ".old.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    directory.rename(partial)
    shutil.rmtree(partial)
