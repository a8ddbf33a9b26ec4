"""What OpenImages is evaluated on: boxes in COCO's form, which `prepare` writes."""

import json
from pathlib import Path

import numpy as np
import pytest
from raw_data import data_of, in_line, write
from test_openimages import CAR, CHAIR, IDS, A, B, without, write_openimages

from pipeline.data.shards.ground_truth import FILE, load_ground_truth
from pipeline.data.shards.preparing import prepare_source
from pipeline.errors import StorageError
from pipeline.evaluation.average_precision import evaluate_coco
from pipeline.evaluation.detections import parse_detections


def test_what_it_is_evaluated_on(tmp_path: Path) -> None:
    """Every box found is AP 1, none is 0; a box in a group is neither right nor wrong."""
    write_openimages(tmp_path)
    source = without("image_labels", "hierarchy")
    data = data_of(tmp_path, source)
    index = prepare_source(source, data, in_line, evaluated=True)
    truth = load_ground_truth(index)
    size = {"width": 40, "height": 30}
    assert truth["images"] == [
        {"id": 0, "file_name": f"{A}.jpg", **size},
        {"id": 1, "file_name": f"{B}.jpg", **size},
    ]
    assert [(row["id"], row["name"]) for row in truth["categories"]][2] == (3, "Bicycle")
    rows = [row for row in truth["annotations"] if not row.get("iscrowd")]
    found = [(row["image_id"], row["category_id"], *np.round(row["bbox"], 3)) for row in rows]
    assert found[:3] == [(0, 3, 0, 0, 40, 30), (1, 1, 10, 3, 10, 3), (1, 1, 0, 0, 20, 15)]
    assert [row[:2] for row in found[3:]] == [(1, 1), (1, 6)]
    (group,) = (row for row in truth["annotations"] if row.get("iscrowd"))
    assert (group["image_id"], group["category_id"], group["isgroupof"]) == (1, IDS[CHAIR], 1)
    np.testing.assert_allclose(group["bbox"], [0, 0, 36, 27], atol=1e-5)

    def ap(*detections: dict) -> float:
        parsed = parse_detections(list(detections))
        return float(evaluate_coco(truth, parsed, origin="truth")["AP"])

    boxes = [{key: row[key] for key in ("image_id", "category_id", "bbox")} for row in rows]
    perfect = [{**box, "score": 0.5} for box in boxes]
    inside = {"image_id": 1, "category_id": IDS[CHAIR], "bbox": [2, 2, 9, 9], "score": 0.9}
    assert ap(*perfect) == ap(*perfect, inside) == 1
    assert ap() == 0
    # A car where there is none, before the three that are there: precision 1/2, 2/3, 3/4, which is
    # 3/4 at every recall; bicycle and face have AP 1.
    elsewhere = {"image_id": 0, "category_id": IDS[CAR], "bbox": [5, 5, 9, 9], "score": 0.9}
    assert ap(*perfect, elsewhere) == pytest.approx((0.75 + 1 + 1) / 3)


def test_ground_truth_that_is_missing_or_of_other_shards_is_told(tmp_path: Path) -> None:
    """Before any training, where raw data to write it from are not there."""
    write_openimages(tmp_path)
    source = without("image_labels", "hierarchy")
    data = data_of(tmp_path, source)
    index = prepare_source(source, data, in_line)
    file = tmp_path / "shards" / source.name / FILE
    assert not file.exists()
    boxes = (tmp_path / "boxes.csv").read_bytes()
    (tmp_path / "boxes.csv").unlink()
    with pytest.raises(StorageError, match=r"ground_truth\.json is missing"):
        prepare_source(source, data, in_line, evaluated=True)
    write(tmp_path / "boxes.csv", boxes)
    prepare_source(source, data, in_line, evaluated=True)
    written = file.stat().st_mtime_ns
    prepare_source(source, data, in_line, evaluated=True)
    assert file.stat().st_mtime_ns == written, "the folder may be one that can only be read"
    (tmp_path / "boxes.csv").unlink()
    assert prepare_source(source, data, in_line, evaluated=True).digest == index.digest
    write(file, json.loads(file.read_text()) | {"index": "another"})
    with pytest.raises(StorageError, match="is of other shards"):
        load_ground_truth(index)
