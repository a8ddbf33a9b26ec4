"""Soft labels of a source's own boxes, made once, in files beside its shards."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load, save
from torch import Tensor

from pipeline.data.batch import Batch
from pipeline.data.shards.index import Index
from pipeline.data.storage.files import is_local_path, local_path, publish_bytes, read_bytes
from pipeline.errors import RecipeError, StorageError
from pipeline.recipe import Teacher, Transforms
from pipeline.semantics.clip import content_hash, model_config, weights_identity
from pipeline.semantics.soft_labels import dense_labels
from pipeline.semantics.sparse import SparseLabels
from pipeline.semantics.text import templates
from pipeline.semantics.towers.choice import regions_of

HEADER = "soft_labels.json"
_FACTS = "longtail"
"""The only entry of a file's metadata."""
_VERSION = 1
"""Raised with a change that makes other labels of the same parts: old files are not read then."""
_OPEN_FILES = 64


@dataclass(frozen=True)
class Header:
    """What is in a folder of labels, written when all its files are there.

    `rest` is the mean and the largest mass of a row that `top_k` spreads evenly; `skipped` counts
    images that could not be read. `identity` is what the labels follow from.
    """

    identity: dict[str, Any]
    temperature: float
    num_categories: int
    num_boxes: int
    num_images: int
    skipped: int
    rest: tuple[float, float]
    num_bytes: int

    @property
    def width(self) -> int:
        """Probabilities that are kept of each row."""
        return min(self.identity["top_k"] or self.num_categories, self.num_categories)


def labels_identity(
    section: Teacher,
    weights: Path | None,
    names: Sequence[str],
    transforms: Transforms,
    index: Index,
) -> dict[str, Any]:
    """All that the stored labels of a source follow from, as plain data.

    `weights` are those of a teacher trained here, `names` the vocabulary in the order of columns.
    """
    if section.text_embeddings is not None:
        text = hashlib.sha256(read_bytes(section.text_embeddings)).hexdigest()
    else:
        text = content_hash(templates(section.prompts))
    config = model_config(section.model)
    return {
        "version": _VERSION,
        "model": section.model,
        "config": content_hash(config),
        "weights": weights_identity(section, weights),
        "text": text,
        "vocabulary": content_hash(list(names)),
        "regions": regions_of(section, config),
        "image_scale": section.image_scale,
        "top_k": section.top_k,
        "short_side": transforms.evaluation_short_side,
        "max_side": transforms.evaluation_max_side,
        "samples": index.digest,
    }


def labels_url(index: Index, identity: Mapping[str, Any]) -> str:
    """The folder for labels of this identity."""
    return f"{index.url}/soft_labels_{content_hash(dict(identity))}"


def file_url(folder: str, shard: int) -> str:
    """The file with the labels of one shard's samples."""
    return f"{folder}/{shard:06d}.safetensors"


def shard_samples(index: Index, shard: int) -> range:
    """The numbers of a shard's samples."""
    start, stop = np.searchsorted(index.shard, [shard, shard + 1])
    return range(int(start), int(stop))


def write_labels(url: str, counts: Sequence[int], labels: SparseLabels, skipped: int = 0) -> None:
    """The labels of a shard, atomically; `counts` are the boxes of each of its samples, 0 for the
    `skipped` ones."""
    arrays: dict[str, NDArray[Any]] = {
        "offsets": np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64),
        "values": labels.values,
    }
    if labels.columns is not None:
        arrays["columns"] = labels.columns
    facts = {"num_categories": labels.num_categories, "skipped": skipped}
    # One entry: safetensors writes several in an order that differs from process to process.
    publish_bytes(url, save(arrays, {_FACTS: json.dumps(facts)}))


def read_labels(url: str) -> tuple[SparseLabels, int]:
    """All labels of a shard, and how many of its samples were skipped."""
    data = read_bytes(url)
    try:
        arrays = load(data)
        length = int.from_bytes(data[:8], "little")
        facts = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][_FACTS])
        labels = SparseLabels(arrays["values"], arrays.get("columns"), int(facts["num_categories"]))
        return labels, int(facts["skipped"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise _damaged(url, error) from None


def write_header(folder: str, header: Header) -> None:
    """State, as the last file, what is in a folder."""
    text = json.dumps(asdict(header), indent=1)
    publish_bytes(f"{folder}/{HEADER}", text.encode())


def read_header(folder: str) -> Header | None:
    """What is in a folder of labels; None where they are not all made."""
    try:
        fields = json.loads(read_bytes(f"{folder}/{HEADER}"))
        return Header(**fields | {"rest": tuple(fields["rest"])})
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise StorageError(
            f"{folder}/{HEADER} is damaged ({error}); delete {folder} and make the labels again: "
            "`longtail prepare RECIPE --soft-labels`"
        ) from None


class StoredSource:
    """The labels of one source's boxes, read as they are asked for.

    Raises `RecipeError` for a folder elsewhere, `StorageError` where labels are missing.
    """

    def __init__(self, index: Index, folder: str) -> None:
        if not is_local_path(folder):
            raise RecipeError(
                f"stored soft labels are read from files of this machine, and {folder} is a URL; "
                "set data.shards to a local folder, or teacher.stored to false"
            )
        header = read_header(folder)
        if header is None:
            raise StorageError(
                f"no soft labels of this teacher, vocabulary and size of image for {index.url} "
                f"({_found(index)}); make them with `longtail prepare RECIPE --soft-labels`, or "
                "set teacher.stored to false"
            )
        self.header = header
        self._index, self._folder = index, folder
        self._files: dict[int, _LabelFile] = {}

    def unlabelled(self) -> frozenset[int]:
        """Numbers of the samples that have boxes and no labels: their images could not be read."""
        found: list[int] = []
        shards = np.unique(self._index.shard).tolist() if self.header.skipped else []
        for shard in shards:
            samples = np.array(shard_samples(self._index, shard))
            boxes = np.diff(self._index.category_offsets)[samples]
            labels = np.diff(_LabelFile(file_url(self._folder, shard)).offsets)
            found += samples[(boxes > 0) & (labels == 0)].tolist()
        return frozenset(found)

    def rows(self, origin: NDArray[np.int64]) -> SparseLabels:
        """Labels of boxes, (N, 2) numbers of the sample and of the box in it."""
        number, width = self.header.num_categories, self.header.width
        values = np.empty((len(origin), width), dtype=np.float32)
        columns = np.empty((len(origin), width), dtype=np.int32) if width < number else None
        for i, (sample, box) in enumerate(origin.tolist()):
            file, row = self._place(sample, box)
            values[i] = file.values[row : row + 1]
            if columns is not None and file.columns is not None:
                columns[i] = file.columns[row : row + 1]
        return SparseLabels(values, columns, number)

    def _place(self, sample: int, box: int) -> tuple["_LabelFile", int]:
        shard = int(self._index.shard[sample])
        if shard not in self._files:
            if len(self._files) >= _OPEN_FILES:
                del self._files[next(iter(self._files))]
            self._files[shard] = _LabelFile(file_url(self._folder, shard))
        file, place = self._files[shard], sample - shard_samples(self._index, shard).start
        first, after = file.offsets[place : place + 2].tolist()
        if not 0 <= box < after - first:
            raise StorageError(
                f"{file_url(self._folder, shard)} has no soft label for box {box} of sample "
                f"{sample}, only for {after - first} boxes; delete {self._folder} and make them "
                "again"
            )
        return file, first + box


class _LabelFile:
    """One shard's labels, mapped: rows of `values` and `columns` are read as they are asked for."""

    def __init__(self, url: str) -> None:
        try:
            file = safe_open(local_path(url), framework="np")
            self.offsets = file.get_tensor("offsets")
            self.values = file.get_slice("values")
            self.columns = file.get_slice("columns") if "columns" in file.keys() else None
        except (OSError, SafetensorError) as error:
            raise _damaged(url, error) from None


class StoredLabels:
    """`SoftLabels` from files. Sources that are not given get even rows, for nobody learns them."""

    batches_ahead = 0

    def __init__(self, sources: Mapping[str, StoredSource]) -> None:
        self._sources = dict(sources)
        header = next(iter(self._sources.values())).header
        self.temperature = header.temperature
        self._number, self._width = header.num_categories, header.width

    def unlabelled(self) -> dict[str, frozenset[int]]:
        """By source, the samples that a stream has to leave out (`StoredSource.unlabelled`)."""
        return {name: source.unlabelled() for name, source in self._sources.items()}

    def ask(self, batch: Batch) -> None:
        """Nothing: they are made."""

    def labels(self, batch: Batch) -> list[Tensor]:
        """See `SoftLabels`."""
        parts = []
        for name, target in zip(batch.source, batch.targets, strict=True):
            assert target.origin is not None, "the stream says where boxes come from"
            source = self._sources.get(name)
            parts.append(
                self._even(target.origin) if source is None else source.rows(target.origin)
            )
        values = np.concatenate([part.values for part in parts])
        places = [part.columns for part in parts if part.columns is not None]
        columns = np.concatenate(places).astype(np.int32) if places else None
        return dense_labels(SparseLabels(values, columns, self._number), batch)

    def _even(self, origin: NDArray[np.int64]) -> SparseLabels:
        values = np.full((len(origin), self._width), 1 / self._number, dtype=np.float32)
        columns = np.tile(np.arange(self._width, dtype=np.int32), (len(origin), 1))
        exact = self._width == self._number
        return SparseLabels(values, None if exact else columns, self._number)


def _damaged(url: str, error: Exception) -> StorageError:
    return StorageError(
        f"{url} cannot be read ({error}); delete it and the {HEADER} beside it, and make what is "
        "missing again: `longtail prepare RECIPE --soft-labels`"
    )


def _found(index: Index) -> str:
    folders = sorted(Path(local_path(index.url)).glob(f"soft_labels_*/{HEADER}"))
    if not folders:
        return "there are none at all"
    other = json.loads(folders[-1].read_text(encoding="utf-8")).get("identity", {})
    shown = ", ".join(f"{key} {other.get(key)}" for key in ("model", "top_k", "short_side"))
    return f"there are others, the last of them with {shown}"
