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
from pipeline.data.index import load_index
from pipeline.data.shards import prepare_source, shards_url
from pipeline.data.stream import EvaluationSet
from pipeline.errors import DataError, RecipeError
from pipeline.evaluation.detect import detect
from pipeline.evaluation.predict import columns_of, load_detector
from pipeline.training.checkpoint import export_detector, load_weights


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
    with pytest.raises(DataError):
        loaded.predict(
            [tmp_path / "runs" / "toy" / "checkpoints" / "step_00000007" / "manifest.json"]
        )


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
    exported = export_detector(directory, tmp_path / "exported", use_ema=True)
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
    exported = export_detector(save_checkpoint(tmp_path), tmp_path / "exported", use_ema=True)
    command = [sys.executable, "-c", BLOCKED, str(exported), str(photographs[0]), training_stack]
    result = subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
