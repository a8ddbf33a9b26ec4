"""The frozen CLIP teacher: soft labels of the ground-truth boxes of a batch."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.data.batch import Batch, Targets, normalise
from pipeline.data.shards.preparing import load_index, shards_url
from pipeline.errors import RecipeError, StorageError
from pipeline.recipe import Data
from pipeline.recipe import Teacher as TeacherSection
from pipeline.semantics.clip import (
    content_hash,
    load_clip,
    model_config,
    pixel_statistics,
    temperature,
)
from pipeline.semantics.towers.choice import describe_regions, region_reader

WEIGHTS_FILE = "teacher.safetensors"
MANIFEST_FILE = "teacher.json"
_TRAINING_VERSION = 1
"""Raised with a change of `contrastive.py` that changes weights: old ones are not reused then."""


def teacher_hash(section: TeacherSection, captions_digest: str) -> str:
    """What a trained teacher follows from: model config, training section, captions."""
    assert section.train is not None, "only a teacher with `train` is trained"
    training = section.train.model_dump(mode="json", exclude={"captions"})
    config = model_config(section.model)
    return content_hash(_TRAINING_VERSION, section.model, config, training, captions_digest)


def teacher_dir(section: TeacherSection, data: Data, cache: str | Path) -> Path:
    """Where the teacher that `section.train` describes lives; its captions must be prepared."""
    assert section.train is not None, "only a teacher with `train` is trained"
    digest = load_index(shards_url(data, section.train.captions)).digest
    return Path(cache) / f"teacher_{teacher_hash(section, digest)}"


def trained_weights(directory: Path) -> Path | None:
    """The weights file of a trained teacher, or None where it has not been trained yet."""
    manifest, weights = directory / MANIFEST_FILE, directory / WEIGHTS_FILE
    if not manifest.is_file():
        return None
    try:
        expected = json.loads(manifest.read_text(encoding="utf-8"))["sha256"]
    except (ValueError, KeyError, TypeError):
        expected = None
    if expected is None or not weights.is_file() or weights_digest(weights) != expected:
        raise StorageError(
            f"{directory} does not hold the whole teacher that its {MANIFEST_FILE} states; delete "
            "it and run again to train the teacher anew"
        )
    return weights


def weights_digest(weights: Path) -> str:
    """The sha256 that a teacher's manifest states."""
    with weights.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class Teacher:
    """A frozen CLIP image tower with the text embeddings of a vocabulary.

    Not an `nn.Module`: nothing of it can reach the student's state, optimizer, checkpoint or
    average. `text_embeddings` is (C, D), unit rows; `weights` is the file of a teacher trained
    here, None for a published one. Raises `RecipeError` where the embeddings are not as wide as
    the model's, or where its tower cannot read regions in the way that is asked for.
    """

    def __init__(
        self,
        section: TeacherSection,
        text_embeddings: Tensor,
        weights: Path | None,
        device: torch.device | str,
    ) -> None:
        config = model_config(section.model)
        width = config["embed_dim"]
        if text_embeddings.ndim != 2 or text_embeddings.shape[1] != width:
            raise RecipeError(
                f"text embeddings of shape {tuple(text_embeddings.shape)} do not fit teacher.model "
                f"{section.model!r}, whose embeddings are {width} wide; compute them with it"
            )
        self.regions = describe_regions(section, config)
        """How boxes are read, for logs."""
        model = load_clip(section, weights)
        self.temperature = temperature(model)
        """What cosines are multiplied by before the softmax."""
        self._visual = model.visual.to(device, memory_format=torch.channels_last)
        self._read = region_reader(section, config, self._visual)
        self._text = text_embeddings.to(device, torch.float32)
        self._mean, self._std = pixel_statistics(section)

    @torch.no_grad()
    def soft_labels(self, batch: Batch) -> list[Tensor]:
        """Each image's (N_i, C) float32 distributions over the categories, one for each box."""
        found = self.box_embeddings(batch)
        labels = (self.temperature * torch.cat(found) @ self._text.T).softmax(dim=-1)
        return list(labels.split([len(rows) for rows in found]))

    def closest_names(self) -> tuple[int, int, float]:
        """The two categories whose text embeddings are most alike, and their cosine."""
        cosines = (self._text @ self._text.T).fill_diagonal_(-1.0)
        place = int(cosines.argmax())
        return *divmod(place, len(cosines)), float(cosines.flatten()[place])

    @torch.no_grad()
    def box_embeddings(self, batch: Batch) -> list[Tensor]:
        """Each image's (N_i, D) float32 unit rows, one for each box.

        Images of one size are read together, without their padding: neither it nor other images
        can change what a box gets. Images without boxes are not looked at, nor those that teach no
        semantics, whose rows are zeros.
        """
        width = self._text.shape[1]
        found = [self._text.new_zeros((len(t.boxes), width)) for t in batch.targets]
        for (height, width), group in _by_size(batch.targets).items():
            images = torch.stack([batch.images[i, :, :height, :width] for i in group])
            whole = torch.zeros_like(images[:, 0], dtype=torch.bool)
            pixels = normalise(images, whole, self._mean, self._std)
            boxes = [_boxes_in_pixels(batch.targets[i]).to(pixels) for i in group]
            embeddings = F.normalize(self._read(pixels, boxes), dim=-1)
            for i, rows in zip(group, embeddings.split([len(box) for box in boxes]), strict=True):
                found[i] = rows
        return found


def _by_size(targets: Sequence[Targets]) -> dict[tuple[int, int], list[int]]:
    """Indices of the images that have boxes and learn semantics, by height and width."""
    groups: dict[tuple[int, int], list[int]] = {}
    for i, target in enumerate(targets):
        if len(target.boxes) and target.semantic_weight:
            groups.setdefault(target.size, []).append(i)
    return groups


def _boxes_in_pixels(target: Targets) -> Tensor:
    """(N, 4) xyxy."""
    sides = torch.tensor([target.size[1], target.size[0]] * 2, dtype=torch.float32)
    centre, extent = target.boxes[:, :2], target.boxes[:, 2:]
    corners = torch.cat([centre - extent / 2, centre + extent / 2], dim=1)
    return corners * sides.to(corners, non_blocking=True)
