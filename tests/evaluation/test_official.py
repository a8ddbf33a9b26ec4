"""The fence around the official package lets nothing through but its numbers."""

import copy
import subprocess
import sys

import numpy as np
from federated_scenes import disturb, draw_annotations

from pipeline.evaluation.official import official_lvis

ISOLATED = """
import logging, sys
for name in ("cv2", "matplotlib", "matplotlib.pyplot"):
    sys.modules[name] = None  # importing it fails, as OpenCV does without libGL
import numpy as np
from pipeline.evaluation.detections import parse_detections
from pipeline.evaluation.official import official_lvis
tree = {
    "images": [{"id": 1, "neg_category_ids": [], "not_exhaustive_category_ids": []}],
    "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9], "area": 81}],
    "categories": [{"id": 1, "name": "one", "frequency": "r"}],
}
row = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9], "score": 1.0}
results = official_lvis(tree, parse_detections([row]))
assert abs(results["APr"] - 1) < 1e-12 and results["APc"] is None, results
assert not hasattr(np, "float"), "numpy was patched"
assert not logging.getLogger().handlers, "the root logger was set up"
assert logging.getLogger("lvis").level == logging.NOTSET
assert "lvis.vis" not in sys.modules
"""


def test_without_drawing_libraries_and_without_side_effects() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ISOLATED], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_what_it_is_given_stays_as_it_was() -> None:
    tree = draw_annotations(3)
    before, detections = copy.deepcopy(tree), disturb(tree, 4)
    first = official_lvis(tree, detections)
    assert tree == before
    assert official_lvis(tree, detections) == first
    assert not hasattr(np, "float")
