"""What crosses from the data rooms into training: targets of an image, and a batch of images."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.errors import DataError

ROUNDING = 1e-5
"""How far a side of a box may be outside [0, 1]: a resize rounds those at the image's edge."""


@dataclass(frozen=True)
class Targets:
    """The ground truth of one image.

    `boxes` is (N, 4) float32, cxcywh as fractions of the image without its padding; `labels` is
    (N,) int64, a column of the recipe's vocabulary, or -1 where no class is given. `size` is
    (height, width) of the image inside the batch before padding, `original_size` that of the
    photograph, `seed` the integer that denoising noise is drawn from; `extra` says that it is of
    the extra stream, whose terms have normalisers of their own. `sampled_negatives` says that
    whatever the labels do not name counts as absent; else only `negative_categories` do. The
    three weights switch the class, box and semantic terms of *every* loss for this image; all are 0
    for a padding sample. `origin` (N, 2) says which boxes they are, where training reads them: the
    number of the sample in the index of its source, and of the box in the sample.
    Raises `DataError` for another shape or dtype; `check_targets` looks at the values.
    """

    boxes: Tensor
    labels: Tensor
    image_id: int
    size: tuple[int, int]
    original_size: tuple[int, int]
    seed: int = 0
    coarse: bool = False
    extra: bool = False
    negative_categories: tuple[int, ...] = ()
    not_exhaustive_categories: tuple[int, ...] = ()
    sampled_negatives: bool = True
    class_weight: float = 1.0
    box_weight: float = 1.0
    semantic_weight: float = 1.0
    origin: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        boxes, labels = self.boxes, self.labels
        if boxes.dim() != 2 or boxes.shape[1] != 4 or not boxes.dtype.is_floating_point:
            raise DataError(
                f"image {self.image_id}: boxes are {_kind(boxes)}, and have to be (N, 4) "
                "floating-point numbers, cxcywh as fractions of the image"
            )
        if labels.shape != boxes.shape[:1] or labels.dtype != torch.int64:
            raise DataError(
                f"image {self.image_id}: labels are {_kind(labels)}, and have to be "
                f"({len(boxes)},) int64, one for each box, -1 where no class is given"
            )

    def to(self, device: torch.device | str) -> "Targets":
        """The same targets with their tensors on `device`."""
        return replace(
            self,
            boxes=self.boxes.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class Batch:
    """A micro-batch of one rank.

    `images` is (B, 3, H, W) uint8, not normalised (detector and teacher each do so on the device),
    and in memory interleaved, (B, H, W, 3), until `to` is called;
    `mask` is (B, H, W) bool, True on padding. `source` names the data source of each image;
    `sample_ids` are "source/key" strings for logs and ledgers.
    """

    images: Tensor
    mask: Tensor
    targets: list[Targets]
    source: list[str] = field(default_factory=list)
    sample_ids: list[str] = field(default_factory=list)

    def num_pixels(self) -> tuple[int, int]:
        """How many pixels are padding, and how many there are; nothing is read from a device."""
        number, height, width = self.mask.shape
        images = sum(h * w for h, w in (target.size for target in self.targets))
        return number * height * width - images, number * height * width

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with its tensors on `device`, its images as planes of one colour each."""
        return replace(
            self,
            images=self.images.to(device, non_blocking=True).contiguous(),
            mask=self.mask.to(device, non_blocking=True),
            targets=[target.to(device) for target in self.targets],
        )

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory, so that the copy to a GPU overlaps compute."""
        pinned = {f.name: getattr(self, f.name) for f in fields(self)}
        pinned["images"], pinned["mask"] = self.images.pin_memory(), self.mask.pin_memory()
        return Batch(**pinned)


def check_targets(
    targets: Sequence[Targets], num_categories: int, names: Sequence[str] = ()
) -> None:
    """Refuse boxes and labels that no loss can be made of, with a `DataError`.

    Boxes must be finite, with corners within [0, 1], labels columns of the vocabulary, or -1.
    `names` are what to call the images, by default their ids. It reads the values, so it belongs
    where they are on the CPU: before they move to a GPU, which it would wait for.
    """
    # All at once, and in numpy: for so few numbers each call costs more than what it does.
    boxes = np.concatenate(
        [np.zeros((0, 4), np.float32), *(target.boxes.numpy() for target in targets)]
    )
    labels = np.concatenate([[-1], *(target.labels.numpy() for target in targets)])
    if _inside(boxes).all() and labels.min() >= -1 and labels.max() < num_categories:
        return
    for i, target in enumerate(targets):
        name = names[i] if names else f"image {target.image_id}"
        if not _inside(target.boxes.numpy()).all():
            _refuse_box(target, name)
        first, last = int(min(target.labels, default=-1)), int(max(target.labels, default=-1))
        if first < -1 or last >= num_categories:
            wrong = first if first < -1 else last
            raise DataError(
                f"{name}: label {wrong} of box {target.labels.tolist().index(wrong)} is outside "
                f"the vocabulary, whose {num_categories} categories are the labels 0 to "
                f"{num_categories - 1}; map it to one of them, or to -1 where no class is given"
            )


def _refuse_box(target: Targets, name: str) -> None:
    outside = ~_inside(target.boxes.numpy()).all(axis=1)
    index = int(np.flatnonzero(outside)[0])
    box = ", ".join(f"{value:g}" for value in target.boxes[index].tolist())
    raise DataError(
        f"{name}: box {index} is [{box}]"
        f"{f' ({int(outside.sum())} boxes are like it)' if outside.sum() > 1 else ''}, and boxes "
        "have to be finite, with corners from 0 to 1: centre, width and height as fractions of the "
        "image without its padding; convert pixels or corners, clip what leaves the image, and "
        "leave out what is not a number"
    )


def _inside(boxes: NDArray[np.floating]) -> NDArray[np.bool_]:
    """(N, 6): whether both corners, and the size, whose sign they do not tell, are in [0, 1]."""
    centre, size = boxes[:, :2], boxes[:, 2:]
    extents = np.concatenate([centre - size / 2, centre + size / 2, size], axis=1)
    return (extents >= -ROUNDING) & (extents <= 1 + ROUNDING)


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def collate(
    images: Sequence[Tensor],
    targets: Sequence[Targets],
    source: Sequence[str],
    sample_ids: Sequence[str],
    size_divisor: int = 32,
    min_side: int = 0,
    memory: Tensor | None = None,
) -> Batch:
    """Pad (3, h, w) uint8 images to one size, a multiple of `size_divisor`, at right and bottom.

    No side of the batch is below `min_side`. Where `memory`, (n,) uint8, is given and large enough,
    images and mask are written there.
    """
    height = max(min_side, *(image.shape[1] for image in images))
    width = max(min_side, *(image.shape[2] for image in images))
    height = -(-height // size_divisor) * size_divisor
    width = -(-width // size_divisor) * size_divisor
    num_bytes = batch_bytes(len(images), height, width)
    if memory is None or len(memory) < num_bytes:
        memory = torch.empty(num_bytes, dtype=torch.uint8)
    padded, mask = batch_views(memory, (len(images), height, width))
    # Rows of bytes, which numpy fills in half of torch's time.
    rows, padding = memory[: mask.numel() * 3].view(*mask.shape[:2], -1).numpy(), mask.numpy()
    for i, image in enumerate(images):
        _, h, w = image.shape
        padded[i, :, :h, :w] = image
        rows[i, :h, 3 * w :] = 0
        rows[i, h:] = 0
        padding[i, :h, :w] = False
        padding[i, :h, w:] = True
        padding[i, h:] = True
    return Batch(padded, mask, list(targets), list(source), list(sample_ids))


def batch_bytes(number: int, height: int, width: int) -> int:
    """Bytes that the images and masks of a batch take."""
    return 4 * number * height * width


def batch_views(memory: Tensor, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) and mask (B, H, W) of a `shape` (B, H, W), in `memory`, (n,) uint8.

    Images are interleaved there, as decoded ones are: so their rows are copied as they are, ten
    times as fast.
    """
    number, height, width = shape
    pixels = number * height * width
    images = memory[: 3 * pixels].view(number, height, width, 3).permute(0, 3, 1, 2)
    return images, memory[3 * pixels : 4 * pixels].view(torch.bool).view(shape)


def normalise(images: Tensor, mask: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(B, 3, H, W) uint8 to float32, (x / 255 - mean) / std, with padding exactly 0."""
    # By way of the CPU, without waiting: a tensor made on a GPU from numbers waits for it.
    statistics = (torch.tensor([mean, std]) * 255).to(images.device, non_blocking=True)
    mean_tensor, std_tensor = statistics[:, None, :, None, None]
    floats = (images.float() - mean_tensor) / std_tensor
    return floats.masked_fill(mask[:, None], 0.0)
