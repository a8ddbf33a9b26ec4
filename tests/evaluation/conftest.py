"""One drawn data set, and detections on it, for the tests of files and results."""

import pytest
from federated_scenes import Tree, disturb, draw_annotations

from pipeline.evaluation.detections import Detections


@pytest.fixture
def tree() -> Tree:
    return draw_annotations(21, num_images=10)


@pytest.fixture
def detections(tree: Tree) -> Detections:
    return disturb(tree, 22)
