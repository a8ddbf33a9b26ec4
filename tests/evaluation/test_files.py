"""Evaluation of anybody's files: the protocol is right or refused, and figures stay labelled."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federated_scenes import Tree, disturb, draw_annotations

from pipeline.errors import DataError, RecipeError
from pipeline.evaluation.detections import Detections
from pipeline.evaluation.files import evaluate_files, only_images, read_image_ids
from pipeline.evaluation.official import official_lvis
from pipeline.evaluation.results import evaluate_detections, format_table


@pytest.fixture
def tree() -> Tree:
    return draw_annotations(21, num_images=10)


@pytest.fixture
def detections(tree: Tree) -> Detections:
    return disturb(tree, 22)


@pytest.fixture
def files(tmp_path: Path, tree: Tree, detections: Detections) -> tuple[Path, Path]:
    (tmp_path / "gt.json").write_text(json.dumps(tree))
    detections.save(tmp_path / "dt.json")
    return tmp_path / "gt.json", tmp_path / "dt.json"


def without_federation(tree: Tree) -> Tree:
    keys = ("neg_category_ids", "not_exhaustive_category_ids")
    images = [{k: v for k, v in image.items() if k not in keys} for image in tree["images"]]
    return tree | {"images": images}


def test_lvis_files_beside_the_official_package(
    tmp_path: Path, files: tuple[Path, Path], tree: Tree, detections: Detections
) -> None:
    text = evaluate_files(*files, out=tmp_path / "out.json", official=True)
    written = json.loads((tmp_path / "out.json").read_text())
    assert text.startswith(format_table(evaluate_detections(tree, detections)))
    for key, value in written["official"].items():
        assert written[key] == pytest.approx(value, abs=1e-12)
    assert "difference" in text
    assert len(written["per_category"]) == 7 and len(written["curves"]["recall"]) == 101


def test_a_subset_of_the_images(
    tmp_path: Path, files: tuple[Path, Path], tree: Tree, detections: Detections
) -> None:
    chosen = [100, 104, 107]
    (tmp_path / "ids.json").write_text(json.dumps(chosen))
    kept = [image for image in tree["images"] if image["id"] in chosen]
    (tmp_path / "minival.json").write_text(json.dumps({"images": kept}))
    expected = official_lvis(tree, only_images(detections, np.array(chosen)))
    for name in ("ids.json", "minival.json"):
        evaluate_files(*files, images=tmp_path / name, out=tmp_path / "out.json")
        written = json.loads((tmp_path / "out.json").read_text())
        assert {key: written[key] for key in expected} == pytest.approx(expected, abs=1e-12)
        assert written["protocol"].endswith("3 of 10 images")
    (tmp_path / "ids.json").write_text("[100, 5]")
    with pytest.raises(DataError, match="5 is not an image"):
        evaluate_files(*files, images=tmp_path / "ids.json")


@pytest.mark.parametrize("content", ["[]", "{}", '["7"]', "[1.5]", "3"])
def test_a_file_that_names_no_images(tmp_path: Path, content: str) -> None:
    (tmp_path / "ids.json").write_text(content)
    with pytest.raises(DataError, match=r"ids\.json: a subset is"):
        read_image_ids(tmp_path / "ids.json")


def test_the_protocol_follows_the_file_and_a_wrong_one_is_refused(
    tmp_path: Path, files: tuple[Path, Path], tree: Tree
) -> None:
    assert evaluate_files(*files).startswith("LVIS box AP, federated")
    for protocol in ("coco", "objects365", "openimages", "visual_genome", "voc2007", "voc2010"):
        with pytest.raises(DataError, match="neg_category_ids"):
            evaluate_files(*files, protocol=protocol)
    files[0].write_text(json.dumps(without_federation(tree)))
    assert evaluate_files(*files).startswith("COCO box AP")
    with pytest.raises(DataError, match="neg_category_ids"):
        evaluate_files(*files, protocol="lvis")


@pytest.mark.parametrize(
    ("protocol", "name"),
    [
        ("objects365", "Objects365"),
        ("openimages", "OpenImages"),
        ("visual_genome", "Visual Genome"),
        ("voc2007", "VOC2007"),
        ("voc2010", "VOC2010"),
    ],
)
def test_other_data_sets_are_labelled(
    files: tuple[Path, Path], tree: Tree, protocol: str, name: str
) -> None:
    files[0].write_text(json.dumps(without_federation(tree)))
    text = evaluate_files(*files, protocol=protocol)
    assert name in text.splitlines()[0].replace("Pascal VOC ", "VOC")
    figures = dict(zip(text.splitlines()[1].split(), text.splitlines()[2].split(), strict=True))
    assert 0 < float(figures["AP50"]) <= 1 and figures["APr"] == "-"


def test_options_of_lvis_are_refused_elsewhere(files: tuple[Path, Path], tree: Tree) -> None:
    files[0].write_text(json.dumps(without_federation(tree)))
    options: list[dict[str, Any]] = [{"official": True}, {"score_threshold": 0.5}]
    for option in options:
        with pytest.raises(RecipeError, match="belong to the LVIS protocol"):
            evaluate_files(*files, **option)


def test_other_limits_have_rows_of_their_own(tmp_path: Path) -> None:
    tree = draw_annotations(5, num_images=3, boxes_per_image=12)
    (tmp_path / "gt.json").write_text(json.dumps(tree))
    disturb(tree, 6, copies=80, score_decimals=6).save(tmp_path / "dt.json")
    text = evaluate_files(tmp_path / "gt.json", tmp_path / "dt.json", score_threshold=0.25)
    labels = [line for line in text.splitlines() if line.startswith("LVIS box AP")]
    assert ["top 300 " in labels[0], "top 1,000 " in labels[1], "fixed AP" in labels[2]] == [
        True
    ] * 3
    assert "at score 0.250 and IoU 0.50: precision 0." in text


def test_broken_files_are_named(files: tuple[Path, Path], tree: Tree) -> None:
    tree["annotations"].append(tree["annotations"][0])
    files[0].write_text(json.dumps(tree))
    with pytest.raises(DataError, match=r"gt\.json: annotations: .* more than once"):
        evaluate_files(*files)
    files[1].write_text("[{")
    with pytest.raises(DataError, match=r"dt\.json is not complete json"):
        evaluate_files(*files)
