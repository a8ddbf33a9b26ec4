"""The frozen CLIP teacher: soft labels of the ground-truth boxes of a batch."""

import hashlib
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from open_clip.modified_resnet import AttentionPool2d, ModifiedResNet
from torch import Tensor
from torchvision.ops import roi_align

from pipeline.data.batch import Batch, Targets, normalise
from pipeline.data.shards import load_index, shards_url
from pipeline.errors import RecipeError, StorageError
from pipeline.recipe import Data
from pipeline.recipe import Teacher as TeacherSection
from pipeline.semantics.clip import content_hash, load_clip, model_config, pixel_statistics

WEIGHTS_FILE = "teacher.safetensors"
MANIFEST_FILE = "teacher.json"
_STRIDE = 32
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
    the model's.
    """

    def __init__(
        self,
        section: TeacherSection,
        text_embeddings: Tensor,
        weights: Path | None,
        device: torch.device | str,
    ) -> None:
        model = load_clip(section, weights)
        self._visual = model.visual.to(device, memory_format=torch.channels_last)
        width = self._visual.output_dim
        if text_embeddings.ndim != 2 or text_embeddings.shape[1] != width:
            raise RecipeError(
                f"text embeddings of shape {tuple(text_embeddings.shape)} do not fit teacher.model "
                f"{section.model!r}, whose embeddings are {width} wide; compute them with it"
            )
        self._text = text_embeddings.to(device, torch.float32)
        self._mean, self._std = pixel_statistics(section)
        self._image_scale = section.image_scale
        self.temperature = min(float(model.logit_scale.exp()), 100.0)
        """exp(logit_scale), what cosines are multiplied by before the softmax."""

    @torch.no_grad()
    def soft_labels(self, batch: Batch) -> list[Tensor]:
        """Each image's (N_i, C) float32 distributions over the categories, one for each box.

        The trunk runs once on the batch; regions are read with RoIAlign and the attention pool
        (RichSem, framework figure: the pooler). Padding is neutral whatever the pixel statistics.
        """
        counts = [len(target.boxes) for target in batch.targets]
        if sum(counts) == 0:
            return [self._text.new_zeros((0, len(self._text))) for _ in counts]
        features, boxes = self.region_inputs(batch)
        logits = self.temperature * region_embeddings(self._visual, features, boxes) @ self._text.T
        return list(logits.softmax(dim=-1).split(counts))

    def region_inputs(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """The trunk's map (B, E, H / 32, W / 32), and boxes xyxy in pixels of what it saw."""
        pixels = normalise(batch.images, batch.mask, self._mean, self._std)
        height, width = pixels.shape[-2:]
        if self._image_scale != 1:
            size = [max(round(side * self._image_scale), 1) for side in (height, width)]
            pixels = F.interpolate(pixels, size, mode="bilinear", antialias=self._image_scale < 1)
        scaled_height, scaled_width = pixels.shape[-2:]
        # The trunk's pooling drops what is left over of a stride, so objects at the edge need this.
        padding = (0, -scaled_width % _STRIDE, 0, -scaled_height % _STRIDE)
        pixels = F.pad(pixels, padding).contiguous(memory_format=torch.channels_last)
        scale = pixels.new_tensor([scaled_width / width, scaled_height / height] * 2)
        boxes = [_boxes_in_pixels(target).to(pixels) * scale for target in batch.targets]
        return trunk(self._visual, pixels), boxes


def trunk(visual: ModifiedResNet, pixels: Tensor) -> Tensor:
    """The image tower up to its attention pool: (B, 3, H, W) to (B, E, H / 32, W / 32)."""
    states = visual.stem(pixels)
    for layer in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
        states = layer(states)
    return states


def region_embeddings(visual: ModifiedResNet, features: Tensor, boxes: list[Tensor]) -> Tensor:
    """(N, D) unit rows of all boxes, which are xyxy in pixels of what the trunk saw."""
    grid = math.isqrt(len(visual.attnpool.positional_embedding) - 1)
    regions = roi_align(
        features, boxes, grid, spatial_scale=1 / _STRIDE, sampling_ratio=0, aligned=True
    )
    return F.normalize(attention_pool(visual.attnpool, regions), dim=-1)


def attention_pool(pool: AttentionPool2d, regions: Tensor) -> Tensor:
    """The attention pool, evaluated for the one query that it returns.

    `regions` is (N, E, G, G) with the grid that the pool was trained for; gives (N, D). The key
    and value projections are folded into the query's side, so they act on one vector for each head
    and not on every position.
    """
    tokens = regions.flatten(2).transpose(1, 2)  # (N, G * G, E)
    tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)
    tokens = tokens + pool.positional_embedding
    number, _, width = tokens.shape
    heads, depth = pool.num_heads, width // pool.num_heads
    query = pool.q_proj(tokens[:, 0]).view(number, heads, depth) * depth**-0.5
    # A key's bias adds the same to the scores of all positions, which the softmax takes out.
    key = pool.k_proj.weight.view(heads, depth, width)
    scores = torch.einsum("nhd,hde->nhe", query, key) @ tokens.transpose(1, 2)  # (N, heads, L)
    attended = scores.softmax(dim=-1) @ tokens  # (N, heads, E)
    value = pool.v_proj.weight.view(heads, depth, width)
    values = torch.einsum("nhe,hde->nhd", attended, value).reshape(number, width)
    return pool.c_proj(values + pool.v_proj.bias)


def _boxes_in_pixels(target: Targets) -> Tensor:
    height, width = target.size
    centre, extent = target.boxes[:, :2], target.boxes[:, 2:]
    corners = torch.cat([centre - extent / 2, centre + extent / 2], dim=1)
    return corners * corners.new_tensor([width, height, width, height])
