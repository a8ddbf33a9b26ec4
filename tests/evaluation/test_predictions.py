"""`longtail predict`: which images it takes, what it writes, and what it says."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_predict import photograph
from tiny_checkpoint import VOCABULARY, save_checkpoint
from tiny_world import run_command

from pipeline.errors import DataError, RecipeError
from pipeline.evaluation.detections import load_detections, parse_detections
from pipeline.evaluation.predict import load_detector
from pipeline.evaluation.predictions import find_images, predict_files, predict_stage
from pipeline.training.locate import locate_checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Photographs that make trouble: the same stem twice, a turned one, notes among them."""
    images = tmp_path / "images"
    (images / "more").mkdir(parents=True)
    photograph(images / "a.jpg", 1, (120, 90))
    photograph(images / "a.png", 2, (100, 64))
    photograph(images / "a_2.jpg", 3, (90, 150), orientation=6)
    photograph(images / "B.JPEG", 4, (64, 64))
    photograph(images / "more" / "A.webp", 5, (64, 80))
    (images / "notes.txt").write_text("no image")
    (images / "scan.tif").write_bytes(b"II*\0")
    return images


def test_files_folders_and_globs_are_found_once_in_order(folder: Path) -> None:
    found = find_images([str(folder / "a.png"), str(folder), str(folder / "**" / "*.webp")])
    names = [str(path.relative_to(folder)) for path in found.images]
    assert names == ["a.png", "B.JPEG", "a.jpg", "a_2.jpg", "more/A.webp"]
    assert found.notes == [f"{folder}: 2 files (.tif, .txt) left out, not images by their names"]
    assert find_images([str(folder / "notes.txt")]).images, "a file by name is always tried"


def test_nothing_to_look_at_is_an_error(folder: Path) -> None:
    with pytest.raises(DataError, match=r"image .*gone.jpg does not exist"):
        find_images([str(folder), str(folder / "gone.jpg")])
    with pytest.raises(DataError, match="no image found in"):
        find_images([str(folder / "*.gif")])
    with pytest.raises(DataError, match=r"has folders inside; name them, or"):
        find_images([str(folder.parent)])


def test_pictures_and_rows_of_every_image(tmp_path: Path, folder: Path) -> None:
    loaded = load_detector(save_checkpoint(tmp_path))
    images = find_images([str(folder), str(folder / "more")]).images
    out = tmp_path / "out"
    calls: list[tuple[int, int]] = []
    summary = predict_files(
        loaded,
        images,
        out,
        score_threshold=0.0,
        top_k=7,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(i, 5) for i in range(1, 6)]
    assert (summary.num_images, summary.num_detections, summary.unreadable) == (5, 35, [])
    tree = json.loads((out / "predictions.json").read_text())
    pictures = [image["picture"] for image in tree["images"]]
    assert pictures == ["B.jpg", "a.jpg", "a_3.jpg", "a_2.jpg", "A_4.jpg"]
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [*pictures, "detections.json", "predictions.json"]
    )
    flat = load_detections(out / "detections.json")
    assert flat.image_id.tolist() == [i for i in range(1, 6) for _ in range(7)]
    turned = tree["images"][3]
    assert (turned["width"], turned["height"]) == (150, 90), "as people see it"
    assert Image.open(out / turned["picture"]).size == (640, 384)
    assert (tree["step"], tree["top_k"], tree["categories"]) == (7, 7, None)
    for number, (image, path) in enumerate(zip(tree["images"], images, strict=True), 1):
        rows = parse_detections(image["detections"])
        [expected] = loaded.predict([path], top_k=7)
        assert image["file"] == str(path) and image["image_id"] == number
        assert (rows.image_id == number).all()
        np.testing.assert_array_equal(rows.category_id, expected.category_id)
        np.testing.assert_allclose(rows.bbox, expected.bbox, atol=1e-3)
        np.testing.assert_allclose(rows.score, expected.score, atol=1e-6)
        names = {
            category.id: (category.name, category.frequency) for category in VOCABULARY.categories
        }
        for row in image["detections"]:
            assert (row["name"], row["frequency"]) == names[row["category_id"]]


def test_files_that_are_named_by_number_keep_it_as_their_id(tmp_path: Path) -> None:
    loaded = load_detector(save_checkpoint(tmp_path))
    images = [photograph(tmp_path / f"{n:012d}.jpg", n, (64, 64)) for n in (42, 7)]
    predict_files(loaded, images, tmp_path / "out", score_threshold=1.0, top_k=5)
    tree = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [image["image_id"] for image in tree["images"]] == [42, 7]
    assert [image["detections"] for image in tree["images"]] == [[], []]


def test_no_file_of_the_user_is_replaced(tmp_path: Path, folder: Path) -> None:
    loaded = load_detector(save_checkpoint(tmp_path))
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    for out, message in (
        (folder, "holds images that are looked at"),
        (folder / "more", "is not a folder of predictions"),
        (folder / "notes.txt", "is a file"),
    ):
        with pytest.raises(RecipeError, match=message):
            predict_files(loaded, [folder / "a.jpg"], out, score_threshold=0.3, top_k=5)
    assert before == {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    for _ in range(2):  # predictions themselves may be replaced
        predict_files(loaded, [folder / "a.jpg"], tmp_path / "o", score_threshold=0.3, top_k=5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score_threshold": 1.5}, "must be between 0 and 1"),
        ({"score_threshold": float("nan")}, "must be between 0 and 1"),
        ({"top_k": 0}, "must be 1 or more"),
        ({"categories": ["kitte"]}, "did you mean 'kite'"),
    ],
)
def test_options_that_cannot_be_meant(
    tmp_path: Path, folder: Path, options: dict[str, object], message: str
) -> None:
    found = locate_checkpoint(save_checkpoint(tmp_path))
    given: dict[str, object] = {"score_threshold": 0.3, "top_k": 5, "device": "cpu"}
    with pytest.raises(RecipeError, match=message):
        predict_stage(found, [str(folder)], tmp_path / "out", **{**given, **options})  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_the_verb_goes_on_past_what_cannot_be_read(tmp_path: Path, folder: Path) -> None:
    save_checkpoint(tmp_path)
    whole = (folder / "a.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    words = ["predict", "runs/toy", "images/*.jpg", "--score-threshold", "0", "--device", "cpu"]
    words += ["--categories", "Striped teal ring,kite"]
    result = run_command("-m", "pipeline", *words, cwd=tmp_path)
    assert result.returncode == 65, result.stderr
    kernel, *complaint = result.stderr.strip().splitlines()
    assert kernel.startswith("deformable attention on cpu: ")
    assert "Traceback" not in result.stderr and len(complaint) == 1
    assert "1 of 3 images could not be read" in result.stderr
    assert "images/cut.jpg: the image is damaged" in result.stderr
    assert "predicting: 3 of 3 images" in result.stdout
    assert "2 images, 48 detections with score" in result.stdout
    tree = json.loads((tmp_path / "predictions" / "predictions.json").read_text())
    assert [entry["file"] for entry in tree["unreadable"]] == ["images/cut.jpg"]
    assert tree["categories"] == ["striped_teal_ring", "kite"]
    assert (tmp_path / "predictions" / "a_2.jpg").is_file()


def test_one_is_no_plural(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = locate_checkpoint(save_checkpoint(tmp_path))
    words, out = [str(folder / "a.jpg")], tmp_path / "out"
    predict_stage(found, words, out, score_threshold=0, top_k=1, device="cpu")
    assert "1 image, 1 detection with score 0 or more" in capsys.readouterr().out
