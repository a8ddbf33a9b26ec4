"""The ONNX file gives what PyTorch gives, by itself, and no file that does not is kept."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_checkpoint import VOCABULARY, save_checkpoint

from pipeline.detectors.interface import Predictions
from pipeline.errors import DataError, RecipeError, StorageError
from pipeline.evaluation import onnx_export
from pipeline.evaluation.detect import select_top
from pipeline.evaluation.onnx_export import compare, default_size, export_onnx, parse_size
from pipeline.evaluation.predict import LoadedDetector, load_detector
from pipeline.recipe import Transforms

SIZE = 64, 90
"""Already the size of the tiny recipe's evaluation, and no multiple of 32: it is padded."""


@pytest.fixture(scope="module")
def exported(module_path: Path) -> tuple[LoadedDetector, Path]:
    for package in onnx_export.PACKAGES:
        pytest.importorskip(package, reason=f"{package} is not installed (extra `onnx`)")
    loaded = load_detector(save_checkpoint(module_path))
    # Scores of cells lie close together, so that a little noise changes their order.
    loaded.detector.encoder_class_embed.scale = 0.1  # type: ignore[union-attr, assignment]
    path = module_path / "new" / "detector.onnx"
    path.parent.mkdir()
    path.with_name("detector.onnx.tmp").write_text("mine")
    comparison = export_onnx(loaded, path, SIZE)
    assert comparison.differences["pred_logits"] < 1e-4
    assert comparison.differences["pred_boxes"] < 1e-5
    return loaded, path


def run(path: Path, image: np.ndarray) -> list[np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [(i.name, i.shape, i.type) for i in session.get_inputs()] == [
        ("images", [1, 3, *SIZE], "tensor(uint8)")
    ]
    assert [(o.name, o.shape) for o in session.get_outputs()] == [
        ("pred_logits", [1, 12, 4]),
        ("pred_boxes", [1, 12, 4]),
    ]
    outputs: list[np.ndarray] = session.run(None, {"images": image})
    return outputs


@pytest.mark.slow
def test_the_file_alone_gives_the_detections_of_predict(
    exported: tuple[LoadedDetector, Path],
) -> None:
    loaded, path = exported
    pixels = np.random.default_rng(5).integers(0, 256, (*SIZE, 3), np.uint8)
    [expected] = loaded.predict([Image.fromarray(pixels)], top_k=20)
    logits, boxes = run(path, pixels.transpose(2, 0, 1)[None])
    predictions = Predictions(torch.from_numpy(logits), torch.from_numpy(boxes))
    [(columns, scores, bbox)] = select_top(predictions, [SIZE], 20)
    np.testing.assert_allclose(scores, expected.score, atol=1e-5)
    np.testing.assert_array_equal(np.array(VOCABULARY.ids)[columns], expected.category_id)
    np.testing.assert_allclose(bbox, expected.bbox, atol=1e-2)


@pytest.mark.slow
def test_the_file_says_what_it_is(exported: tuple[LoadedDetector, Path]) -> None:
    import onnx

    loaded, path = exported
    model = onnx.load(str(path))
    onnx.checker.check_model(model, full_check=True)
    assert [opset.version for opset in model.opset_import if opset.domain == ""] == [18]
    stated = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(stated["category_names"]) == VOCABULARY.names
    assert json.loads(stated["category_ids"]) == [3, 5, 9, 12]
    assert json.loads(stated["category_frequencies"]) == ["r", "f", "c", "f"]
    assert json.loads(stated["pixel_mean"]) == list(loaded.detector.pixel_mean)  # type: ignore[arg-type]
    assert (stated["height"], stated["width"], stated["step"]) == ("64", "90", "7")
    beside = path.with_name("detector.onnx.tmp")
    assert set(path.parent.iterdir()) == {path, beside}, "no other file is needed"
    assert beside.read_text() == "mine"
    with pytest.raises(StorageError, match="exists already"):
        export_onnx(loaded, path, SIZE)


@pytest.mark.slow
def test_cells_in_another_order_are_no_difference_and_other_cells_are(
    exported: tuple[LoadedDetector, Path],
) -> None:
    """A slightly other class head takes tied cells in another order, a new one takes others."""
    loaded, path = exported
    divisor = loaded.recipe.data.transforms.size_divisor
    image = torch.randint(0, 256, (1, 3, *SIZE), dtype=torch.uint8)

    def disturbed(noise: float) -> Any:
        detector = copy.deepcopy(loaded.detector)
        torch.manual_seed(0)
        with torch.no_grad():
            weight = detector.encoder_class_embed.weight  # type: ignore[union-attr]
            weight.mul_(1 + noise * torch.randn_like(weight))  # type: ignore[operator, arg-type]
        module = onnx_export._ImagesToPredictions(detector, SIZE, divisor).eval()
        return module, compare(module, path, image)

    module, near = disturbed(0.1)
    onnx_export._refuse_difference(near)
    assert near.reordered > 0 and "begin at another cell" in str(near)
    assert near.differences["pred_logits"] < 1e-4 and near.differences["pred_boxes"] < 1e-5
    with torch.inference_mode():
        naive = (module(image)[0] - torch.from_numpy(run(path, image.numpy())[0])).abs().max()
    assert naive > 1e-2, "compared place by place, the two would not agree"
    _, far = disturbed(3.0)
    assert far.score_difference > 1e-2
    with pytest.raises(DataError, match="does not agree with PyTorch"):
        onnx_export._refuse_difference(far)


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [0.1, float("nan")])
def test_a_file_that_disagrees_is_removed(
    exported: tuple[LoadedDetector, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    wrong: float,
) -> None:
    loaded, _ = exported
    right = onnx_export._run

    def another(model: bytes, image: torch.Tensor) -> list[np.ndarray]:
        logits, *others = right(model, image)
        return [logits + wrong, *others]

    monkeypatch.setattr(onnx_export, "_run", another)
    with pytest.raises(DataError, match=r"does not agree with PyTorch \(.*it was removed"):
        export_onnx(loaded, tmp_path / "out.onnx", SIZE)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named_with_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_detector(save_checkpoint(tmp_path))
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(RecipeError, match=r"onnxscript.*pip install 'longtail\[onnx\]'"):
        export_onnx(loaded, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_sizes() -> None:
    assert parse_size("800x1088") == (800, 1088)
    assert default_size(Transforms()) == (800, 1067)
    assert default_size(Transforms(evaluation_short_side=128, evaluation_max_side=160)) == (
        120,
        160,
    )
    for text in ("800", "800x", "0x0", "31x64", "axb", "800x1088x3", "-800x100"):
        with pytest.raises(RecipeError, match="HEIGHTxWIDTH"):
            parse_size(text)
