"""A small CLIP trained from scratch on captions (Radford et al. 2021, section 2.3)."""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.data.batch import normalise
from pipeline.data.images import decode_image
from pipeline.data.sample import Sample
from pipeline.errors import DataError, RecipeError
from pipeline.recipe import Teacher, TeacherTraining
from pipeline.semantics.clip import encode_text, new_clip, pixel_statistics
from pipeline.semantics.teacher import (
    MANIFEST_FILE,
    WEIGHTS_FILE,
    trained_weights,
    weights_digest,
)
from pipeline.semantics.towers.resnet import region_embeddings, trunk

Progress = Callable[[int, int, float], None]
"""Called with the step, the number of steps, and the loss."""

_SEED = 0
_MAX_CAPTIONS = 50_000
_MAX_LOGIT_SCALE = math.log(100)
_CELL = 6
"""Eighths of the model's image size that a cell of a collage has: objects as small as in use."""
_CROP_AREA = (0.75, 1.0)
_CROP_STRETCH = 0.2
"""Largest change of a crop's aspect, as a logarithm."""


class Captions(Protocol):
    """Images with captions: what an index of shards offers."""

    @property
    def num_samples(self) -> int: ...

    @property
    def digest(self) -> str: ...

    def read(self, index: int, /) -> Sample: ...


def train_teacher(
    section: Teacher,
    captions: Captions,
    out_dir: str | Path,
    progress: Progress | None = None,
    *,
    progress_every: int = 20,
    device: torch.device | str = "cpu",
) -> Path:
    """Train `section.model` on `captions`; gives the weights file under `out_dir`.

    The same section and captions give the same batches and the same initial weights. `out_dir`
    appears complete or not at all, and is reused when it is there. Raises `RecipeError` for a
    batch size that is no multiple of 4, and for captions that are too few for a batch or too many
    to hold in memory; `DataError` for an image without a caption.
    """
    directory, training = Path(out_dir), section.train
    found = trained_weights(directory)
    if found is not None:
        return found
    assert training is not None, "only a teacher with `train` is trained"
    if not training.batch_size <= captions.num_samples <= _MAX_CAPTIONS:
        raise RecipeError(
            f"teacher.train.captions has {captions.num_samples} images; training from scratch "
            f"takes from teacher.train.batch_size ({training.batch_size}) to {_MAX_CAPTIONS}"
        )
    if training.batch_size % 4:
        raise RecipeError(
            f"teacher.train.batch_size {training.batch_size} must be a multiple of 4: images are "
            "put into 2x2 collages"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        model = new_clip(section.model).to(device, memory_format=torch.channels_last)
    _open_residual_branches(model)
    images, tokens = _read(captions, section.model, model.visual.image_size)
    optimizer = _optimizer(model, training)
    rng = np.random.default_rng(_SEED)
    order = _batches(rng, tokens, training)
    mean, std = pixel_statistics(section)
    model.train()
    for step, chosen in enumerate(order, start=1):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(training, step)
        collages, boxes = _collages(
            rng, images[chosen].to(device), model.visual.image_size * _CELL // 8
        )
        pixels = normalise(collages, torch.zeros_like(collages[:, 0], dtype=torch.bool), mean, std)
        features = trunk(model.visual, pixels.contiguous(memory_format=torch.channels_last))
        image = _by_cell(region_embeddings(model.visual, features, boxes))
        said = tokens[chosen].to(device)
        loss = _contrastive_loss(image, encode_text(model, said), model.logit_scale.exp(), said)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, _MAX_LOGIT_SCALE)
        if progress is not None and (step % progress_every == 0 or step == training.steps):
            progress(step, training.steps, float(loss.detach()))
    return _publish(directory, section, captions.digest, model)


def _read(captions: Captions, model_name: str, image_size: int) -> tuple[Tensor, Tensor]:
    """(N, 3, S, S) uint8 images with a margin to crop from, and (N, L) tokens of their captions."""
    side = image_size * 9 // 8
    images = torch.empty((captions.num_samples, 3, side, side), dtype=torch.uint8)
    texts = []
    for i in range(captions.num_samples):
        sample = captions.read(i)
        if sample.caption is None:
            raise DataError(f"{sample.key}: no caption; teacher.train.captions must be captions")
        picture = decode_image(sample.image).resize((side, side), Image.Resampling.BILINEAR)
        images[i] = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        texts.append(sample.caption)
    return images, open_clip.get_tokenizer(model_name)(texts)


def _batches(rng: np.random.Generator, tokens: Tensor, training: TeacherTraining) -> list[Tensor]:
    """Indices of each step: whole epochs in random order, the short last batch dropped.

    A batch is four runs of captions that mostly share words (the order is by two min-hashes of
    their tokens), so that telling them apart takes all words and not the easiest one.
    """
    number, size = len(tokens), training.batch_size
    run = max(size // 4, 1)
    words = tokens.numpy()
    batches: list[Tensor] = []
    while len(batches) < training.steps:
        ranks = rng.random((2, int(words.max()) + 1))
        ranks[:, 0] = 1  # padding
        order = np.lexsort([rng.random(number), *(rank[words].min(axis=1) for rank in ranks)])
        runs = order[: number // run * run].reshape(-1, run)
        shuffled = torch.from_numpy(runs[rng.permutation(len(runs))].reshape(-1))
        batches.extend(shuffled[: number // size * size].split(size))
    return batches[: training.steps]


def _collages(rng: np.random.Generator, images: Tensor, side: int) -> tuple[Tensor, list[Tensor]]:
    """2x2 collages (B / 4, 3, 2 * side, 2 * side) uint8, and their cells' boxes (4, 4) xyxy.

    The teacher reads regions of larger images, so it learns to tell a region from what is around
    it. Cell k of collage i shows a part of image i + k * B / 4, flipped half of the time.
    """
    x, y = (int(cut) for cut in np.rint(rng.uniform(0.7, 1.3, 2) * side))
    whole, quarter = 2 * side, len(images) // 4
    cells = [(0, 0, x, y), (x, 0, whole, y), (0, y, x, whole), (x, y, whole, whole)]
    collages = images.new_empty((quarter, 3, whole, whole))
    for k, (x0, y0, x1, y1) in enumerate(cells):
        part = images[k * quarter : (k + 1) * quarter]
        collages[:, :, y0:y1, x0:x1] = _crop(rng, part, y1 - y0, x1 - x0)
    boxes = torch.tensor(cells, dtype=torch.float32, device=images.device)
    return collages, [boxes] * quarter


def _by_cell(embeddings: Tensor) -> Tensor:
    """Rows in the order of the images again, from collage by collage."""
    return embeddings.view(-1, 4, embeddings.shape[-1]).transpose(0, 1).flatten(0, 1)


def _crop(rng: np.random.Generator, images: Tensor, height: int, width: int) -> Tensor:
    """A random part of each (B, 3, S, S) uint8 image, of nearly the shape asked for, resized."""
    number = len(images)
    area = rng.uniform(*_CROP_AREA, number)
    aspect = width / height * np.exp(rng.uniform(-_CROP_STRETCH, _CROP_STRETCH, number))
    extent = np.minimum(np.stack([np.sqrt(area * aspect), np.sqrt(area / aspect)], axis=1), 1.0)
    centre = rng.uniform(-1, 1, (number, 2)) * (1 - extent)
    extent[rng.random(number) < 0.5, 0] *= -1
    transform = np.zeros((number, 2, 3), np.float32)
    transform[:, [0, 1], [0, 1]] = extent
    transform[:, :, 2] = centre
    theta = torch.from_numpy(transform).to(images.device)
    grid = F.affine_grid(theta, [number, 3, height, width], align_corners=False)
    crops = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    return crops.round().clamp(0, 255).to(torch.uint8)


def _contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, tokens: Tensor) -> Tensor:
    """Symmetric cross entropy over unit rows (B, D).

    A caption whose words all stand in an image's own caption is no negative of that image: it is
    the same caption, or says less.
    """
    logits = scale * image @ text.T  # (B images, B texts)
    used, positions = tokens.unique(return_inverse=True)
    words = torch.zeros(len(tokens), len(used), device=tokens.device)
    words.scatter_(1, positions, 1.0)
    implied = words @ words.T == words.sum(dim=1)  # [i, j]: words of j within those of i
    implied.fill_diagonal_(False)
    own = torch.arange(len(tokens), device=tokens.device)
    to_text = F.cross_entropy(logits.masked_fill(implied, -math.inf), own)
    to_image = F.cross_entropy(logits.masked_fill(implied, -math.inf).T, own)
    return (to_text + to_image) / 2


def _open_residual_branches(model: nn.Module) -> None:
    """Start the last gain of each block at 1: open_clip's 0 is meant for deep towers."""
    for name, parameter in model.named_parameters():
        if name.endswith("bn3.weight"):
            nn.init.ones_(parameter)


def _optimizer(model: nn.Module, training: TeacherTraining) -> torch.optim.AdamW:
    """AdamW with CLIP's betas; gains, biases, the scale and the embeddings are not decayed."""
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (kept if parameter.ndim < 2 or "embedding" in name else decayed).append(parameter)
    groups: list[dict[str, object]] = [{"params": decayed}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        groups,
        lr=training.learning_rate,
        betas=(0.9, 0.98),
        eps=1e-6,
        weight_decay=training.weight_decay,
        fused=True,
    )


def _learning_rate(training: TeacherTraining, step: int) -> float:
    """Linear warm-up, then half a cosine down to zero; `step` counts from 1."""
    if step <= training.warmup_steps:
        return training.learning_rate * step / training.warmup_steps
    progress = (step - training.warmup_steps) / max(training.steps - training.warmup_steps, 1)
    return training.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def _publish(directory: Path, section: Teacher, digest: str, model: nn.Module) -> Path:
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        save_file(state, temporary / WEIGHTS_FILE)
        manifest = {
            "model": section.model,
            "training": section.train and section.train.model_dump(mode="json"),
            "captions": digest,
            "sha256": weights_digest(temporary / WEIGHTS_FILE),
        }
        (temporary / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        temporary.chmod(0o755)
        try:
            os.replace(temporary, directory)
        except OSError:
            # Another run with the same content has published it in the meantime.
            if trained_weights(directory) is None:
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return directory / WEIGHTS_FILE
