"""A trained detector on any photograph: what a checkpoint is loaded into for use."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.data.batch import Batch, Targets, collate
from pipeline.data.images import read_image, to_rgb
from pipeline.data.transforms import as_picture, evaluation_transform
from pipeline.data.vocabulary.categories import Vocabulary, clean_name
from pipeline.detectors.interface import Detector, Predictions
from pipeline.errors import DataError, RecipeError
from pipeline.evaluation.detect import detect
from pipeline.evaluation.detections import Detections
from pipeline.recipe import Recipe, Transforms
from pipeline.training import checkpoint
from pipeline.training.locate import Checkpoint, locate_checkpoint


@dataclass(frozen=True)
class LoadedDetector:
    """A checkpoint's detector in evaluation mode, on its device, and what belongs to it.

    `directory` is the checkpoint folder. The detector follows `detectors.interface.Detector`, with
    one column for each category of `vocabulary`; `recipe` says at which size images are looked at.
    """

    detector: nn.Module
    vocabulary: Vocabulary
    recipe: Recipe
    directory: Path

    @property
    def device(self) -> torch.device:
        """Where the detector is."""
        return next(self.detector.parameters()).device

    def predict(
        self,
        images: Iterable[Image.Image | str | Path],
        *,
        score_threshold: float = 0.0,
        top_k: int | None = None,
    ) -> list[Detections]:
        """Detections of each image, best first, exactly as the evaluation makes them.

        A file is decoded as people see it; so is an opened image, but for its EXIF orientation:
        boxes are in its own pixels. At most `top_k` (query, category) pairs are kept for an image,
        by default as many as the evaluation keeps. `image_id` is the image's place in `images`.
        Raises `DataError` for what is not a readable image.
        """
        limit = self.recipe.evaluation.max_detections if top_k is None else top_k
        transforms = self.recipe.data.transforms
        results = []
        for number, image in enumerate(images):
            batch = evaluation_batch(_in_rgb(image, number), transforms, number)
            found = detect(self.detector, [batch], self.device, limit, self.vocabulary)
            results.append(found.above(score_threshold))
        return results

    def only(self, names: Sequence[str]) -> "LoadedDetector":
        """The same detector for the named categories alone; raises `RecipeError` for another."""
        columns = columns_of(names, self.vocabulary)
        return replace(
            self,
            detector=_SomeCategories(self.detector, columns).eval(),
            vocabulary=Vocabulary([self.vocabulary.categories[column] for column in columns]),
        )


class _SomeCategories(nn.Module):
    """A detector's predictions for some of its columns, so that the others take no place."""

    def __init__(self, detector: nn.Module, columns: Sequence[int]) -> None:
        super().__init__()
        inner = cast(Detector, detector)
        self.pixel_mean, self.pixel_std = inner.pixel_mean, inner.pixel_std
        self.detector, self.columns = detector, list(columns)

    def forward(self, images: Tensor, mask: Tensor) -> Predictions:
        predictions: Predictions = self.detector(images, mask)
        return Predictions(predictions.logits[..., self.columns], predictions.boxes)


def load_detector(
    path: str | Path | Checkpoint, *, device: torch.device | str = "cpu"
) -> LoadedDetector:
    """A checkpoint, ready to predict, with neither teacher, DeepSpeed nor Ray.

    `path` is an exported folder, a `checkpoints/step_N` folder, a run directory (its newest) or a
    recipe. Averaged weights are taken where there are some and the recipe's `evaluation.use_ema`
    says so. Raises `RecipeError` and `StorageError` as `locate_checkpoint` does.
    """
    place = path if isinstance(path, Checkpoint) else locate_checkpoint(path)
    use_ema = place.recipe.evaluation.use_ema
    detector, vocabulary, _ = checkpoint.load_detector(place.directory, use_ema, place.manifest)
    return LoadedDetector(detector.to(device), vocabulary, place.recipe, place.directory)


def evaluation_batch(image: Image.Image, transforms: Transforms, image_id: int) -> Batch:
    """One RGB image as the evaluation sees it: its one resize, and padding to the divisor."""
    nothing = as_picture(image, np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
    picture = evaluation_transform(nothing, transforms)
    targets = Targets(
        boxes=picture.normalised_boxes(),
        labels=picture.labels,
        image_id=image_id,
        size=picture.size,
        original_size=(image.height, image.width),
    )
    return collate([picture.image], [targets], [], [], transforms.size_divisor)


def columns_of(names: Sequence[str], vocabulary: Vocabulary) -> list[int]:
    """Columns of the named categories, ascending; case, spaces and underscores do not matter.

    Raises `RecipeError` that names the nearest known names.
    """
    known: dict[str, list[int]] = {}
    for column, name in enumerate(vocabulary.names):
        known.setdefault(_plain(name), []).append(column)
    unknown = [name for name in names if _plain(name) not in known]
    if unknown:
        near = ", ".join(f"{name!r} ({_nearest(name, list(known))})" for name in unknown)
        raise RecipeError(
            f"not among the detector's {vocabulary.num_categories} categories: {near}; write the "
            "names of the vocabulary"
        )
    if not names:
        raise RecipeError("no category is named; give some, or leave the choice out for all")
    return sorted({column for name in names for column in known[_plain(name)]})


def _in_rgb(image: Image.Image | str | Path, number: int) -> Image.Image:
    try:
        return to_rgb(image) if isinstance(image, Image.Image) else read_image(Path(image))
    except DataError as error:
        name = f"number {number}" if isinstance(image, Image.Image) else image
        raise DataError(f"image {name}: {error}") from error


def _plain(name: str) -> str:
    return clean_name(name).casefold()


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(_plain(name), known, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(repr(one) for one in close)}?"
    return f"the first known ones are {', '.join(repr(one) for one in known[:3])}"
