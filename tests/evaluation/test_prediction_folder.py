"""A folder of predictions is one run's, whole or marked as going on, and never the user's files."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_predict import photograph
from tiny_world import ENVIRONMENT, ROOT

from pipeline.errors import RecipeError, StorageError
from pipeline.evaluation.detections import load_detections
from pipeline.evaluation.prediction_folder import PredictionFolder

HEAD = {"checkpoint": "runs/toy/checkpoints/step_00000007", "step": 7}
ROW = {
    "category_id": 3,
    "name": "striped_teal_ring",
    "frequency": "r",
    "score": 0.75,
    "bbox": [1.0, 2.0, 30.0, 20.5],
}


def fill(folder: Path, images: list[Path]) -> None:
    output = PredictionFolder(folder, HEAD, images)
    for place in output.places:
        output.add(place, Image.open(place.file), [ROW | {"image_id": place.image_id}])
    output.finish()


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def stated(folder: Path) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads((folder / "predictions.json").read_text())
    return tree


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    (tmp_path / "images").mkdir()
    return [photograph(tmp_path / "images" / f"{i}.jpg", i, (64, 48)) for i in (11, 12, 13)]


def test_a_second_run_leaves_nothing_of_the_first(tmp_path: Path, images: list[Path]) -> None:
    out = tmp_path / "out"
    fill(out, images)
    assert names_in(out) == ["11.jpg", "12.jpg", "13.jpg", "detections.json", "predictions.json"]
    (out / "mine.jpg").write_bytes(b"not of a run")
    second = PredictionFolder(out, HEAD, images[1:2])
    assert names_in(out) == ["mine.jpg", "predictions.json"]
    second.leave_out(second.places[0], "damaged")
    second.finish()
    assert names_in(out) == ["detections.json", "mine.jpg", "predictions.json"]
    assert len(load_detections(out / "detections.json")) == 0


def test_the_json_says_what_is_done_and_what_is_to_come(tmp_path: Path, images: list[Path]) -> None:
    output = PredictionFolder(tmp_path / "out", HEAD, images)
    for done, place in enumerate(output.places):
        tree = stated(tmp_path / "out")
        assert tree["complete"] is False and tree["step"] == 7
        assert [entry["image_id"] for entry in tree["images"]] == [11, 12, 13][:done]
        assert [entry["picture"] for entry in tree["pending"]] == ["11.jpg", "12.jpg", "13.jpg"][
            done:
        ]
        output._next_update = 0.0  # a long time ago
        output.add(place, Image.open(place.file), [ROW | {"image_id": place.image_id}])
    output.finish()
    tree = stated(tmp_path / "out")
    assert tree["complete"] is True and tree["pending"] == []
    found = load_detections(tmp_path / "out" / "detections.json")
    np.testing.assert_array_equal(found.image_id, [11, 12, 13])
    np.testing.assert_array_equal(found.bbox, [ROW["bbox"]] * 3)
    [row, *_] = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert row.keys() == {"image_id", "category_id", "bbox", "score"}


KILLED = """
import os, signal, sys
from pathlib import Path
from PIL import Image
from pipeline.evaluation.prediction_folder import PredictionFolder
output = PredictionFolder(Path(sys.argv[1]), {"checkpoint": "x"}, list(map(Path, sys.argv[2:])))
for place in output.places[:2]:
    output.add(place, Image.open(place.file), [])
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_is_known_for_one_and_can_be_started_again(
    tmp_path: Path, images: list[Path]
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(out), *map(str, images)]
    result = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=False)
    assert result.returncode == -signal.SIGKILL
    assert names_in(out) == ["11.jpg", "12.jpg", "predictions.json"]
    assert stated(out)["complete"] is False
    fill(out, images[2:])
    assert names_in(out) == ["13.jpg", "detections.json", "predictions.json"]
    assert stated(out)["complete"] is True


def test_a_run_that_was_killed_at_its_first_file_can_be_started_again(
    tmp_path: Path, images: list[Path]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "predictions.json.tmp").write_text('{"comp')
    fill(tmp_path / "out", images)
    assert stated(tmp_path / "out")["complete"] is True


@pytest.mark.parametrize(
    "text",
    [
        '[{"image_id": 1, "category_id": 2, "bbox": [0, 0, 1, 1], "score": 0.5}]',
        '{"images": [{"id": 1}]}',
        '{"images": []}',
        '{"checkpoint": "x", "images": [{"picture": "../images/11.jpg"}]}',
        '{"checkpoint": "x", "images": [{"picture": "notes.txt"}]}',
        "{",
    ],
)
def test_a_json_of_somebody_else_is_not_replaced(
    tmp_path: Path, images: list[Path], text: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "predictions.json").write_text(text)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(RecipeError, match="was not written by `longtail predict`"):
        fill(out, images)
    assert (out / "predictions.json").read_text() == text
    assert names_in(out) == ["notes.txt", "predictions.json"] and images[0].exists()


def test_what_storage_refuses_is_said_with_the_path_and_a_way_out(
    tmp_path: Path, images: list[Path]
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file/out could not be written: .*Not a directory.*-o"):
        fill(tmp_path / "file" / "out", images)
    (tmp_path / "out" / "12.jpg").mkdir(parents=True)
    (tmp_path / "out" / "predictions.json").write_text('{"checkpoint": "x", "images": []}')
    with pytest.raises(StorageError, match=r"out/12.jpg could not be written: .*Is a directory"):
        fill(tmp_path / "out", images)
    assert stated(tmp_path / "out")["complete"] is False
