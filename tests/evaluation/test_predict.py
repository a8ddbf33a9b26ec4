"""A loaded checkpoint sees what the evaluation sees, and brings none of the training stack."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_checkpoint import VOCABULARY, checkpoint_recipe, save_checkpoint
from tiny_world import ENVIRONMENT, ROOT

import pipeline
from pipeline.data.shards.index import load_index
from pipeline.data.shards.preparing import prepare_source, shards_url
from pipeline.data.stream.batches import EvaluationSet
from pipeline.errors import DataError, RecipeError, StorageError
from pipeline.evaluation.detect import detect
from pipeline.evaluation.predict import columns_of, load_detector
from pipeline.training import manifest
from pipeline.training.checkpoint import export_detector, load_weights
from pipeline.training.checkpoint import load_detector as load_checkpoint
from pipeline.training.locate import locate_checkpoint
from pipeline.training.manifest import file_digest


def photograph(path: Path, seed: int, size: tuple[int, int], orientation: int = 1) -> Path:
    """Coloured patches; with an EXIF orientation, people see it turned."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    if path.suffix == ".png":
        image = image.convert("L")
    image.save(path, exif=exif)
    return path


@pytest.fixture
def photographs(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "raw" / "photographs"
    folder.mkdir(parents=True)
    return [
        photograph(folder / "000000000011.jpg", 1, (120, 90)),
        photograph(folder / "000000000012.jpg", 2, (90, 150), orientation=6),
        photograph(folder / "000000000013.png", 3, (71, 64)),
        photograph(folder / "000000000014.jpg", 4, (300, 40)),
    ]


def write_annotations(path: Path, sizes: list[tuple[int, int]]) -> None:
    tree = {
        "images": [
            {
                "id": 11 + i,
                "width": width,
                "height": height,
                "file_name": f"{11 + i:012d}.{'png' if i == 2 else 'jpg'}",
                "neg_category_ids": [],
                "not_exhaustive_category_ids": [],
            }
            for i, (width, height) in enumerate(sizes)
        ],
        "annotations": [],
        "categories": [
            {"id": c.id, "name": c.name, "frequency": c.frequency, "synset": c.name + ".n.01"}
            for c in VOCABULARY.categories
        ],
    }
    path.write_text(json.dumps(tree))


def test_the_evaluation_and_predict_give_the_same_boxes(
    tmp_path: Path, photographs: list[Path]
) -> None:
    write_annotations(tmp_path / "raw" / "lvis.json", [(120, 90), (150, 90), (71, 64), (300, 40)])
    loaded = load_detector(save_checkpoint(tmp_path))
    data = checkpoint_recipe(tmp_path).data
    assert data.validation is not None

    def in_line(function, arguments):  # type: ignore[no-untyped-def]
        return ((place, function(argument)) for place, argument in enumerate(arguments))

    prepare_source(data.validation, data, in_line)
    index = load_index(shards_url(data, data.validation))
    batches = EvaluationSet(data, index, VOCABULARY).iterate(1)
    evaluated = detect(loaded.detector, batches, "cpu", 20, VOCABULARY)
    predicted = loaded.predict(photographs, top_k=20)
    assert sorted(set(evaluated.image_id.tolist())) == [11, 12, 13, 14]
    for image_id, found in zip((11, 12, 13, 14), predicted, strict=True):
        rows = evaluated.image_id == image_id
        assert len(found) == rows.sum() == 20
        for field in ("bbox", "score", "category_id"):
            np.testing.assert_array_equal(getattr(found, field), getattr(evaluated, field)[rows])
    turned = predicted[1].bbox
    assert (turned[:, 0] + turned[:, 2]).max() > 90, "boxes are in pixels of the turned image"
    assert (turned[:, 1] + turned[:, 3]).max() <= 90 + 1e-3


def test_an_opened_image_is_as_good_as_its_file(tmp_path: Path, photographs: list[Path]) -> None:
    loaded = load_detector(save_checkpoint(tmp_path))
    [from_file, from_image] = loaded.predict([photographs[2], Image.open(photographs[2])])
    np.testing.assert_array_equal(from_file.bbox, from_image.bbox)
    assert from_file.image_id[0] == 0 and from_image.image_id[0] == 1
    middle = float(np.median(from_file.score))
    [some] = loaded.predict([photographs[2]], score_threshold=middle)
    assert 0 < len(some) < len(from_file) and some.score.min() >= middle


@pytest.mark.parametrize("mode", ["I;16", "I", "RGBA", "LA", "P", "1"])
def test_an_opened_image_of_any_mode_is_as_good_as_its_file(tmp_path: Path, mode: str) -> None:
    loaded = load_detector(save_checkpoint(tmp_path))
    ramp = np.linspace(0, 65535, 64 * 80).reshape(64, 80).astype(np.uint16)
    grey = Image.fromarray((ramp >> 8).astype(np.uint8))
    transparent = Image.merge("LA", [grey, grey.rotate(180)]).convert("RGBA")
    path = tmp_path / "image.png"
    if mode.startswith("I"):
        image = Image.fromarray(ramp if mode == "I;16" else ramp.astype(np.int32))
        Image.fromarray(ramp).save(path)
    else:
        image = transparent.convert(mode)
        image.save(path)
    assert image.mode == mode
    [from_file, from_image, reopened] = loaded.predict([path, image, Image.open(path)])
    for other in (from_image, reopened):
        np.testing.assert_array_equal(from_file.bbox, other.bbox)
        np.testing.assert_array_equal(from_file.score, other.score)


def test_what_is_no_readable_image_is_named(tmp_path: Path, photographs: list[Path]) -> None:
    directory = save_checkpoint(tmp_path)
    loaded = load_detector(directory)
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(photographs[0].read_bytes()[:-200])
    for image, message in [
        (tmp_path / "gone.jpg", r"gone.jpg: the file cannot be read \(No such file"),
        (str(tmp_path), r"the file cannot be read \(Is a directory"),
        (directory / "manifest.json", "manifest.json: not an image"),
        (cut, "cut.jpg: the image is damaged or cut short"),
        (Image.open(cut), "image number 1: the image is damaged or cut short"),
    ]:
        with pytest.raises(DataError, match=message):
            loaded.predict([photographs[1], image])


def test_loading_reads_what_the_detector_needs_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = save_checkpoint(tmp_path)
    hashed: list[str] = []

    def digest(path: Path) -> dict[str, object]:
        hashed.append(path.name)
        return file_digest(path)

    monkeypatch.setattr(manifest, "file_digest", digest)
    wanted = ["averaged.safetensors", "weights.safetensors"]
    for path in (directory, directory.parent.parent):
        hashed.clear()
        load_detector(path)
        assert sorted(hashed) == wanted
    hashed.clear()
    load_checkpoint(directory, use_ema=True)
    assert sorted(hashed) == wanted, "by itself, it verifies"
    hashed.clear()
    exported = export_detector(locate_checkpoint(directory), tmp_path / "exported")
    assert sorted(hashed) == [*wanted, "weights.safetensors"], "and those that are written, once"
    (directory / "optimizer.safetensors").unlink()
    load_detector(directory)
    for folder in (directory, exported):
        weights = folder / "weights.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
        with pytest.raises(StorageError, match=r"weights.safetensors has another sha256"):
            load_detector(folder)


def test_chosen_categories_do_not_compete_with_the_others(
    tmp_path: Path, photographs: list[Path]
) -> None:
    loaded = load_detector(save_checkpoint(tmp_path))
    number = 12 * 4  # every query with every category
    [everything] = loaded.predict(photographs[:1], top_k=number)
    assert len(everything) == number
    [chosen] = loaded.only(["kite", "Bow (weapon)"]).predict(photographs[:1], top_k=5)
    rows = np.isin(everything.category_id, [9, 12])
    np.testing.assert_array_equal(chosen.category_id, everything.category_id[rows][:5])
    np.testing.assert_array_equal(chosen.bbox, everything.bbox[rows][:5])


def test_a_name_is_found_however_it_is_written() -> None:
    assert columns_of(["Aerosol  can", "STRIPED_TEAL_RING"], VOCABULARY) == [0, 1]
    with pytest.raises(RecipeError, match=r"4 categories: 'striped teal rng' \(did you mean 'stri"):
        columns_of(["kite", "striped teal rng"], VOCABULARY)
    with pytest.raises(RecipeError, match=r"'qqq' \(the first known ones are 'striped teal ring'"):
        columns_of(["qqq"], VOCABULARY)


def test_averages_are_taken_as_the_recipe_says_and_an_export_keeps_them(tmp_path: Path) -> None:
    directory = save_checkpoint(tmp_path)
    name = "bbox_embed.layers.2.weight"
    loaded = pipeline.load_detector(directory)
    assert not loaded.detector.training
    assert loaded.vocabulary == VOCABULARY and loaded.recipe.name == "toy"
    state = loaded.detector.state_dict()
    assert torch.equal(state[name], load_weights(directory, ema=True)[name])
    assert not torch.equal(state[name], load_weights(directory, ema=False)[name])
    exported = export_detector(locate_checkpoint(directory), tmp_path / "exported")
    again = pipeline.load_detector(exported).detector.state_dict()
    assert state.keys() == again.keys()
    assert all(torch.equal(state[key], again[key]) for key in state)


BLOCKED = """
import sys
for name in ("deepspeed", "ray", "open_clip"):
    if sys.argv[3] == "blocked":
        sys.modules[name] = None
import pipeline
assert "torch" not in sys.modules
[found] = pipeline.load_detector(sys.argv[1]).predict([sys.argv[2]])
assert len(found) == 48, len(found)
loaded = [m for m in ("deepspeed", "ray", "open_clip") if sys.modules.get(m) is not None]
assert not loaded, loaded
"""


@pytest.mark.parametrize("training_stack", ["there", "blocked"])
def test_prediction_needs_no_training_stack(
    tmp_path: Path, photographs: list[Path], training_stack: str
) -> None:
    exported = export_detector(locate_checkpoint(save_checkpoint(tmp_path)), tmp_path / "exported")
    command = [sys.executable, "-c", BLOCKED, str(exported), str(photographs[0]), training_stack]
    result = subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
