"""COCO 2014 and 2017 (Lin et al. 2014): 80 categories, every instance boxed, or in a crowd."""

from pipeline.data.sources.instances import (
    CROWD,
    coco_names,
    exhaustive_record,
    find_images,
    read_instances,
)
from pipeline.data.sources.record import RecordSet
from pipeline.recipe import Source


def list_coco(source: Source, root: str) -> RecordSet:
    """One record for each image of an `instances_*.json`, in ascending image id.

    Images without an annotation stay: they show none of the categories. Category ids are the
    file's, from 1 to 90 with gaps. A crowd region is left out and counted, unless `keep_flagged`.
    """
    instances = read_instances(source, root)
    record_set = RecordSet(instances.vocabulary, [])
    flags = {} if source.keep_flagged else {"iscrowd": CROWD}
    record_set.records = [
        exhaustive_record(source, instances, record_set, found, flags)
        for found in find_images(source, root, instances, coco_names)
    ]
    return record_set
