"""The whole detector as one ONNX file, compared with PyTorch before it is published.

    images       (1, 3, H, W) uint8, RGB, 0 to 255, scaled to the file's size as the user likes
    pred_logits  (1, num_queries, num_categories) float32; the sigmoid gives scores
    pred_boxes   (1, num_queries, 4) float32, cxcywh as fractions of the image

Normalisation and padding are inside the graph. Metadata holds categories and sizes.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.data.batch import normalise
from pipeline.data.transforms import fit_short_side
from pipeline.detectors.dino.transformer import Memory, QuerySelection, anchor_boxes
from pipeline.detectors.interface import Detector, Predictions
from pipeline.errors import DataError, RecipeError, StorageError
from pipeline.evaluation.predict import LoadedDetector
from pipeline.recipe import Transforms
from pipeline.training.manifest import read_manifest, unfinished

OPSET = 18
"""torch's own; GridSample is there from 16 on, and a later opset asks for a later runtime."""
OUTPUTS = ("pred_logits", "pred_boxes")
LARGEST_DIFFERENCE = {"pred_logits": 1e-2, "pred_boxes": 1e-3}
"""Above one of these the file is not published; usual are 2e-5 and 3e-7."""
PACKAGES = ("onnx", "onnxruntime", "onnxscript")
Size = tuple[int, int]
"""(height, width)."""


@dataclass(frozen=True)
class Comparison:
    """Largest differences between onnxruntime and PyTorch on a random image, by output's name.

    `reordered` of `num_queries` queries begin at another cell of the encoder's maps, because
    scores of cells tie to within `score_difference`; both sides are compared from the same cells.
    """

    differences: dict[str, float]
    score_difference: float
    reordered: int
    num_queries: int

    def __str__(self) -> str:
        text = ", ".join(f"{name} {value:.1e}" for name, value in self.differences.items())
        text = f"largest difference to PyTorch on a random image: {text}"
        if self.reordered:
            text += (
                f"; {self.reordered} of {self.num_queries} queries begin at another cell, whose "
                f"scores differ by at most {self.score_difference:.1e}, and are compared from there"
            )
        return text


class _ImagesToPredictions(nn.Module):
    """One uint8 image in, padded and normalised as at evaluation; tensors out."""

    mask: Tensor

    def __init__(self, detector: nn.Module, size: Size, divisor: int) -> None:
        super().__init__()
        self.detector = detector
        height, width = (-(-side // divisor) * divisor for side in size)
        self.padding = (0, width - size[1], 0, height - size[0])
        mask = torch.ones((1, height, width), dtype=torch.bool)
        mask[:, : size[0], : size[1]] = False
        self.register_buffer("mask", mask)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        statistics = cast(Detector, self.detector)
        padded = F.pad(images.float(), self.padding)
        pixels = normalise(padded, self.mask, statistics.pixel_mean, statistics.pixel_std)
        predictions: Predictions = self.detector(pixels, self.mask)
        return predictions.logits, predictions.boxes


def export_onnx(loaded: LoadedDetector, path: Path, size: Size | None = None) -> Comparison:
    """Write the detector for images of `size` into a new file, once it agrees with PyTorch.

    `size` is the evaluation's for a 4:3 photograph by default. Raises `RecipeError` where packages
    of the extra `onnx` are missing, `StorageError` for a file that exists, and `DataError` when
    outputs differ by more than `LARGEST_DIFFERENCE`.
    """
    onnx = _packages()["onnx"]
    if path.suffix != ".onnx":
        raise RecipeError(f"-o {path}: an ONNX file is named NAME.onnx")
    if path.exists():
        raise StorageError(f"{path} exists already; name a new file")
    transforms = loaded.recipe.data.transforms
    size = size or default_size(transforms)
    module = _ImagesToPredictions(loaded.detector.cpu(), size, transforms.size_divisor).eval()
    image = torch.randint(
        0, 256, (1, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        program = torch.onnx.export(
            module,
            (image,),
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=list(OUTPUTS),
            external_data=False,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    onnx.helper.set_model_props(model, _metadata(loaded, size))
    partial = unfinished(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        onnx.save(model, str(partial))
        comparison = compare(module, partial, image)
        _refuse_difference(comparison)
        partial.rename(path)
    except OSError as error:
        raise StorageError(f"{path} could not be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return comparison


def default_size(transforms: Transforms) -> Size:
    """The evaluation's size for a 4:3 photograph."""
    return fit_short_side(
        (3000, 4000), transforms.evaluation_short_side, transforms.evaluation_max_side
    )


def parse_size(text: str) -> Size:
    """`800x1088`, height first; raises `RecipeError` otherwise."""
    match = re.fullmatch(r"(\d{2,5})x(\d{2,5})", text)
    if not match or min(map(int, match.groups())) < 32:
        raise RecipeError(f"--size {text!r} must be HEIGHTxWIDTH of at least 32, such as 800x1088")
    return int(match[1]), int(match[2])


def compare(module: nn.Module, path: Path, image: Tensor) -> Comparison:
    """Run the file in onnxruntime and the module in PyTorch on the same image.

    The detector takes its best cells by score. Where scores of two cells agree to the last digits,
    the two runtimes may take them in another order, and every later query moves up a place; so
    PyTorch is given the runtime's own choice, after that was found to be as good as PyTorch's.
    """
    found = _run(path.read_bytes(), image)
    chosen, values = _choice(path, image)
    if chosen is None or values is None:
        with torch.inference_mode():
            expected = module(image)
        return Comparison(_differences(found, expected), 0.0, 0, found[0].shape[1])
    selection = next(part for part in module.modules() if isinstance(part, QuerySelection))
    gaps: list[float] = []
    orders: list[Tensor] = []

    def choose(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        memory, score, refine = arguments

        def forced(cells: Tensor) -> Tensor:
            scores = score(cells)
            gaps.append(_worst_gap(scores, chosen, values, memory))
            _, usable = anchor_boxes(memory)
            own = scores.masked_fill(~usable, -torch.inf)
            orders.append(own.topk(chosen.shape[1], dim=1).indices)
            ranks = torch.arange(chosen.shape[1], 0, -1, dtype=scores.dtype)[None]
            floor = torch.full_like(scores, -1.0)
            return floor.scatter(1, chosen, ranks)

        return memory, forced, refine

    handle = selection.register_forward_pre_hook(choose)
    try:
        with torch.inference_mode():
            expected = module(image)
    finally:
        handle.remove()
    reordered = int((orders[0] != chosen)[values > -torch.inf].sum())
    differences = _differences(found, expected)
    return Comparison(differences, gaps[0], reordered, chosen.shape[1])


def _worst_gap(scores: Tensor, chosen: Tensor, values: Tensor, memory: Memory) -> float:
    """How far the runtime's choice of cells is from PyTorch's scores (1, S).

    The larger of two: a chosen cell's score there and here, and by how much the best cell that was
    left is better than the worst that was chosen.
    """
    _, usable = anchor_boxes(memory)
    counted = values > -torch.inf
    here = scores.gather(1, chosen)
    gap = (here - values)[counted].abs().max() if counted.any() else here.new_zeros(())
    left = scores.masked_fill(~usable, -torch.inf).scatter(1, chosen, -torch.inf).max()
    worst = here[counted].min() if counted.all() else here.new_tensor(-torch.inf)
    excess = left - worst
    return float(torch.maximum(gap, excess.clamp(min=0).nan_to_num(0.0)))


def _refuse_difference(comparison: Comparison) -> None:
    limits = LARGEST_DIFFERENCE
    large = [n for n, value in comparison.differences.items() if not value <= limits[n]]
    if large or not comparison.score_difference <= limits["pred_logits"]:
        stated = ", ".join(f"{name} {value:g}" for name, value in limits.items())
        raise DataError(
            f"the ONNX file does not agree with PyTorch ({comparison}; allowed are {stated}), so "
            "it was removed; try another --size, and please report the recipe of this checkpoint"
        )


def _differences(found: Sequence[NDArray[np.float32]], expected: Any) -> dict[str, float]:
    return {
        name: float((torch.from_numpy(ours) - theirs).abs().max())
        for name, ours, theirs in zip(OUTPUTS, found, expected, strict=True)
    }


def _choice(path: Path, image: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Cells (1, Q) that the runtime takes, and their scores; None where the graph has no TopK."""
    onnx = _packages()["onnx"]
    model = onnx.load(str(path))
    nodes = [node for node in model.graph.node if node.op_type == "TopK"]
    if len(nodes) != 1:
        return None, None
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in nodes[0].output)
    *_, values, chosen = _run(model.SerializeToString(), image)
    return torch.from_numpy(chosen), torch.from_numpy(values)


def _run(model: bytes, image: Tensor) -> list[NDArray[Any]]:
    runtime = _packages()["onnxruntime"]
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    outputs: list[NDArray[Any]] = session.run(None, {"images": image.numpy()})
    return outputs


def _metadata(loaded: LoadedDetector, size: Size) -> dict[str, str]:
    """What a user of the file alone needs to know; values are text, lists are json."""
    statistics, vocabulary = cast(Detector, loaded.detector), loaded.vocabulary
    return {
        "input": "images: (1, 3, height, width) uint8, RGB, 0 to 255; normalised in the graph",
        "outputs": "pred_logits: sigmoid gives scores; pred_boxes: cxcywh, fractions of the image",
        "height": str(size[0]),
        "width": str(size[1]),
        "pixel_mean": json.dumps(statistics.pixel_mean),
        "pixel_std": json.dumps(statistics.pixel_std),
        "category_ids": json.dumps(vocabulary.ids),
        "category_names": json.dumps(vocabulary.names),
        "category_frequencies": json.dumps(vocabulary.frequencies),
        "recipe": loaded.recipe.name,
        "step": str(read_manifest(loaded.directory).step),
    }


def _packages() -> dict[str, ModuleType]:
    """The packages of the extra `onnx`; raises `RecipeError` where one is missing."""
    try:
        return {name: import_module(name) for name in PACKAGES}
    except ImportError as error:
        raise RecipeError(
            f"an ONNX export needs {', '.join(PACKAGES)} ({error}); install them with "
            "`pip install 'longtail[onnx]'`"
        ) from error
