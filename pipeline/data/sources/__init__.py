"""Raw data sets as they are published: one module for each format."""

from pipeline.data.sources.captions import list_captions
from pipeline.data.sources.coco import list_coco
from pipeline.data.sources.imagenet21k import list_imagenet21k, read_labels
from pipeline.data.sources.instances import read_instances
from pipeline.data.sources.lvis import list_lvis
from pipeline.data.sources.mentions import read_finder
from pipeline.data.sources.objects365 import list_objects365
from pipeline.data.sources.openimages import list_openimages, read_classes
from pipeline.data.sources.record import Record, RecordSet, read_record
from pipeline.data.sources.visual_genome import list_visual_genome
from pipeline.data.sources.voc import list_voc
from pipeline.data.storage.files import file_size, resolve
from pipeline.data.vocabulary.categories import Vocabulary
from pipeline.errors import DataError
from pipeline.recipe import Source
from pipeline.recipe.data import CAPTION_FORMATS

__all__ = ["Record", "RecordSet", "list_categories", "list_records", "read_record"]

_READERS = {
    "lvis": list_lvis,
    "objects365": list_objects365,
    "imagenet21k": list_imagenet21k,
    "cc3m": list_captions,
    "cc12m": list_captions,
    "coco": list_coco,
    "voc": list_voc,
    "openimages": list_openimages,
    "visual_genome": list_visual_genome,
}

_SMALL_FILE = 2**28
"""Bytes up to which a file is read for its categories alone; the json of Objects365 has gigabytes,
which is minutes."""


def list_categories(source: Source, root: str) -> Vocabulary | None:
    """The categories of a source where no listing of images and no large file tells them, else
    None. Raises `RecipeError` or `DataError` for a file that has none."""
    of_classes = source.format in (*CAPTION_FORMATS, "openimages")
    path = source.files.classes if of_classes else source.annotations
    try:
        size = None if path is None else file_size(resolve(root, path))
    except IsADirectoryError:  # Refused where it is listed.
        return None
    if size is None or size > _SMALL_FILE:
        return None
    if source.format in CAPTION_FORMATS:
        finder = read_finder(source, root)
        return None if finder is None else finder.vocabulary
    if source.format == "openimages":
        return read_classes(source, root)[0]
    if source.format == "imagenet21k":
        return read_labels(source, root)[0]
    if source.format in ("lvis", "coco", "objects365"):
        return read_instances(source, root).vocabulary
    return None


def list_records(source: Source, root: str, vocabulary: Vocabulary | None = None) -> RecordSet:
    """Every usable record of a source whose paths are relative to `root`; no image is read.

    Of Visual Genome, whose names are free, `vocabulary` may say which are categories.
    Raises `RecipeError` for a missing file or directory, `DataError` for a bad annotation (file,
    id, value, rule and fix), `StorageError` when storage fails.
    """
    if vocabulary is not None:
        assert source.format == "visual_genome", "other formats state their categories"
        record_set = list_visual_genome(source, root, vocabulary)
    else:
        record_set = _READERS[source.format](source, root)
    if not record_set.records:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in record_set.dropped.items())
        raise DataError(
            f"source {source.name} has no usable sample ({reasons or 'its files are empty'}); "
            "check `images` and `annotations`"
        )
    return record_set
