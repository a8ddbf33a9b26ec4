"""What crosses from the data rooms into training: targets of an image, and a batch of images."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Targets:
    """The ground truth of one image.

    `boxes` is (N, 4) float32, cxcywh as fractions of the image without its padding; `labels` is
    (N,) int64, a column of the recipe's vocabulary, or -1 where no class is given. `size` is
    (height, width) of the image inside the batch before padding, `original_size` that of the
    photograph, `seed` the integer that denoising noise is drawn from. The three weights switch the
    class, box and semantic terms of *every* loss for this image; all are 0 for a padding sample.
    """

    boxes: Tensor
    labels: Tensor
    image_id: int
    size: tuple[int, int]
    original_size: tuple[int, int]
    seed: int = 0
    coarse: bool = False
    negative_categories: tuple[int, ...] = ()
    not_exhaustive_categories: tuple[int, ...] = ()
    class_weight: float = 1.0
    box_weight: float = 1.0
    semantic_weight: float = 1.0

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

    `images` is (B, 3, H, W) uint8, not normalised (detector and teacher each do so on the device);
    `mask` is (B, H, W) bool, True on padding. `source` names the data source of each image;
    `sample_ids` are "source/key" strings for logs and ledgers.
    """

    images: Tensor
    mask: Tensor
    targets: list[Targets]
    source: list[str] = field(default_factory=list)
    sample_ids: list[str] = field(default_factory=list)

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with its tensors on `device`."""
        return replace(
            self,
            images=self.images.to(device, non_blocking=True),
            mask=self.mask.to(device, non_blocking=True),
            targets=[target.to(device) for target in self.targets],
        )

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory, so that the copy to a GPU overlaps compute."""
        pinned = {f.name: getattr(self, f.name) for f in fields(self)}
        pinned["images"], pinned["mask"] = self.images.pin_memory(), self.mask.pin_memory()
        return Batch(**pinned)


def collate(
    images: Sequence[Tensor],
    targets: Sequence[Targets],
    source: Sequence[str],
    sample_ids: Sequence[str],
    size_divisor: int = 32,
) -> Batch:
    """Pad (3, h, w) uint8 images to one size, a multiple of `size_divisor`, at right and bottom."""
    height = max(image.shape[1] for image in images)
    width = max(image.shape[2] for image in images)
    height = -(-height // size_divisor) * size_divisor
    width = -(-width // size_divisor) * size_divisor
    padded = images[0].new_zeros((len(images), 3, height, width))
    mask = torch.ones((len(images), height, width), dtype=torch.bool)
    for i, image in enumerate(images):
        padded[i, :, : image.shape[1], : image.shape[2]] = image
        mask[i, : image.shape[1], : image.shape[2]] = False
    return Batch(padded, mask, list(targets), list(source), list(sample_ids))


def normalise(images: Tensor, mask: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(B, 3, H, W) uint8 to float32, (x / 255 - mean) / std, with padding exactly 0."""
    shape = (1, 3, 1, 1)
    mean_tensor = torch.tensor(mean, device=images.device).view(shape) * 255
    std_tensor = torch.tensor(std, device=images.device).view(shape) * 255
    floats = (images.float() - mean_tensor) / std_tensor
    return floats.masked_fill(mask[:, None], 0.0)
