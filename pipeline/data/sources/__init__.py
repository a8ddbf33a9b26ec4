"""Raw data sets as they are published: one module for each format."""

from pipeline.data.sources.captions import list_captions
from pipeline.data.sources.coco import list_coco
from pipeline.data.sources.imagenet21k import list_imagenet21k
from pipeline.data.sources.lvis import list_lvis
from pipeline.data.sources.objects365 import list_objects365
from pipeline.data.sources.openimages import list_openimages
from pipeline.data.sources.record import Record, RecordSet, read_record
from pipeline.data.sources.visual_genome import list_visual_genome
from pipeline.data.sources.voc import list_voc
from pipeline.errors import DataError
from pipeline.recipe import Source

__all__ = ["Record", "RecordSet", "list_records", "read_record"]

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


def list_records(source: Source, root: str) -> RecordSet:
    """Every usable record of a source whose paths are relative to `root`; no image is read.

    Raises `RecipeError` for a missing file or directory, `DataError` for a bad annotation (file,
    id, value, rule and fix), `StorageError` when storage fails.
    """
    record_set = _READERS[source.format](source, root)
    if not record_set.records:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in record_set.dropped.items())
        raise DataError(
            f"source {source.name} has no usable sample ({reasons or 'its files are empty'}); "
            "check `images` and `annotations`"
        )
    return record_set
