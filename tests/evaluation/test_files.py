"""Evaluation of anybody's files: the protocol is right or refused, and figures stay labelled."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federated_scenes import Tree, disturb, draw_annotations

from pipeline.arguments import PROTOCOLS, build_parser
from pipeline.cli import evaluate
from pipeline.errors import DataError, RecipeError, StorageError
from pipeline.evaluation.detections import Detections
from pipeline.evaluation.files import (
    COCO_STYLE,
    VOC,
    check_output,
    evaluate_files,
    read_image_ids,
)
from pipeline.evaluation.official import official_lvis
from pipeline.evaluation.results import evaluate_detections, save_results
from pipeline.evaluation.tables import format_table


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
    text, results = evaluate_files(*files, official=True)
    save_results(tmp_path / "out.json", results)
    written = json.loads((tmp_path / "out.json").read_text())
    assert text.startswith(format_table(evaluate_detections(tree, detections)))
    assert "differs" not in text
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
    expected = official_lvis(tree, detections.on_images(np.array(chosen)))
    elsewhere = int((~np.isin(detections.image_id, chosen)).sum())
    for name in ("ids.json", "minival.json"):
        text, results = evaluate_files(*files, images=tmp_path / name)
        assert {key: results[key] for key in expected} == pytest.approx(expected, abs=1e-12)
        assert results["protocol"].endswith("3 of 10 images")
        assert results["counts"]["detections"] == len(detections)
        assert results["counts"]["detections_elsewhere"] == elsewhere > 0
        assert f"{elsewhere} on images that are not evaluated" in text
    assert "not evaluated" not in evaluate_files(*files)[0]
    (tmp_path / "ids.json").write_text("[100, 5]")
    with pytest.raises(DataError, match=r"ids\.json: 5 is not an image"):
        evaluate_files(*files, images=tmp_path / "ids.json")


@pytest.mark.parametrize("federated", [True, False])
def test_a_subset_hides_no_detection_of_an_unknown_image(
    tmp_path: Path, files: tuple[Path, Path], tree: Tree, federated: bool
) -> None:
    if not federated:
        files[0].write_text(json.dumps(without_federation(tree)))
    rows = json.loads(files[1].read_text())
    rows[3]["image_id"] = 5000
    files[1].write_text(json.dumps(rows))
    (tmp_path / "ids.json").write_text("[100, 104]")
    with pytest.raises(DataError, match=r"dt\.json: 5000 is an unknown image id \(1 of"):
        evaluate_files(*files, images=tmp_path / "ids.json")


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"images": []}', '["7"]', "[1.5]", "[true]", f"[{2**70}]", "3"]
)
def test_a_file_that_names_no_images(tmp_path: Path, content: str) -> None:
    (tmp_path / "ids.json").write_text(content)
    with pytest.raises(DataError, match=r"ids\.json: a subset is"):
        read_image_ids(tmp_path / "ids.json")


def test_the_protocol_follows_the_file_and_a_wrong_one_is_refused(
    tmp_path: Path, files: tuple[Path, Path], tree: Tree
) -> None:
    assert evaluate_files(*files)[0].startswith("LVIS box AP, federated")
    for protocol in ("coco", "objects365", "openimages", "visual_genome", "voc2007", "voc2010"):
        with pytest.raises(DataError, match="neg_category_ids"):
            evaluate_files(*files, protocol=protocol)
    files[0].write_text(json.dumps(without_federation(tree)))
    assert evaluate_files(*files)[0].startswith("COCO box AP")
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
    text, results = evaluate_files(*files, protocol=protocol, score_threshold=0.25)
    assert name in text.splitlines()[0].replace("Pascal VOC ", "VOC")
    figures = dict(zip(text.splitlines()[1].split(), text.splitlines()[2].split(), strict=True))
    assert 0 < float(figures["AP50"]) <= 1 and figures["APr"] == "-"
    assert "at score 0.250 and IoU 0.50: precision 0." in text
    assert ("AR@100 0." in text) == ("VOC" not in name)
    assert results["AP"] is not None


def test_the_command_line_offers_every_protocol() -> None:
    assert set(PROTOCOLS) == {"lvis", *COCO_STYLE, *VOC}


def test_options_of_lvis_are_refused_elsewhere(files: tuple[Path, Path], tree: Tree) -> None:
    files[0].write_text(json.dumps(without_federation(tree)))
    with pytest.raises(RecipeError, match="belongs to the LVIS protocol"):
        evaluate_files(*files, official=True)


@pytest.mark.parametrize("threshold", [float("nan"), 7.0, -0.1])
def test_a_threshold_is_a_score(files: tuple[Path, Path], threshold: float) -> None:
    with pytest.raises(RecipeError, match="give one from 0 to 1"):
        evaluate_files(*files, score_threshold=threshold)


def test_where_figures_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_output(tmp_path / "out.json")
    with pytest.raises(RecipeError, match="is a directory"):
        check_output(tmp_path)
    with pytest.raises(RecipeError, match="there is no folder"):
        check_output(tmp_path / "missing" / "out.json")
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(StorageError, match="cannot be written to"):
        check_output(tmp_path / "out.json")


def test_the_table_is_shown_though_its_figures_cannot_be_stored(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, results: Any) -> None:
        raise StorageError(f"cannot write {path}: no space left")

    monkeypatch.setattr("pipeline.evaluation.results.save_results", full)
    words = ["--annotations", str(files[0]), "--detections", str(files[1])]
    out = files[0].with_name("out.json")
    with pytest.raises(StorageError, match="no space left"):
        evaluate(build_parser().parse_args(["evaluate", *words, "--json", str(out)]))
    assert capsys.readouterr().out.startswith("LVIS box AP")


@pytest.mark.parametrize("which", [0, 1, "images"])
def test_a_directory_is_no_file(tmp_path: Path, files: tuple[Path, Path], which: int | str) -> None:
    given: dict[Any, Path] = {0: files[0], 1: files[1], which: tmp_path}
    with pytest.raises(DataError, match="is a directory"):
        evaluate_files(given[0], given[1], images=given.get("images"))


def test_other_limits_have_rows_of_their_own(tmp_path: Path) -> None:
    tree = draw_annotations(5, num_images=3, boxes_per_image=12)
    (tmp_path / "gt.json").write_text(json.dumps(tree))
    disturb(tree, 6, copies=80, score_decimals=6).save(tmp_path / "dt.json")
    text, _ = evaluate_files(tmp_path / "gt.json", tmp_path / "dt.json", score_threshold=0.25)
    labels = [line for line in text.splitlines() if line.startswith("LVIS box AP")]
    assert ["top 300 " in labels[0], "top 1,000 " in labels[1], "fixed AP" in labels[2]] == [
        True
    ] * 3
    assert "at score 0.250 and IoU 0.50: precision 0." in text
    assert ["  AR@300 0." in text, "  ARs@1000 0." in text, "  ARl@fixed 0." in text] == [True] * 3


def test_broken_files_are_named(files: tuple[Path, Path], tree: Tree) -> None:
    tree["annotations"].append(tree["annotations"][0])
    files[0].write_text(json.dumps(tree))
    with pytest.raises(DataError, match=r"gt\.json: annotations: .* more than once"):
        evaluate_files(*files)
    tree["annotations"].pop()
    files[0].write_text(json.dumps(tree))
    files[1].write_text("[{")
    with pytest.raises(DataError, match=r"dt\.json is not complete json"):
        evaluate_files(*files)
