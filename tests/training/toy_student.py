"""A detector of a few hundred parameters that keeps the interface, and runs over several ranks."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.data.batch import Batch, Targets, collate
from pipeline.detectors.interface import (
    LossContext,
    MatchedRegions,
    Predictions,
    TrainingOutput,
)

NUM_CATEGORIES = 7
LAYOUTS = {
    "0": {"zero_stage": 0},
    "1": {"zero_stage": 1},
    "2": {"zero_stage": 2},
    "3": {"zero_stage": 3},
    "1 optimizer": {"zero_stage": 1, "offload": "optimizer"},
    "2 optimizer": {"zero_stage": 2, "offload": "optimizer"},
    "3 optimizer": {"zero_stage": 3, "offload": "optimizer"},
    "3 all": {"zero_stage": 3, "offload": "all"},
}
"""Every way in which the engine lays out what trains: stage of ZeRO, and what is offloaded."""


class ToyDetector(nn.Module):
    """One query per image; sizes are odd so that no ZeRO partition comes out even."""

    pixel_mean = (0.485, 0.456, 0.406)
    pixel_std = (0.229, 0.224, 0.225)
    feature_dim = 5
    class_heads = ("class_embed",)

    def __init__(self, num_categories: int = NUM_CATEGORIES) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 5, 3, stride=4), nn.Tanh(), nn.Conv2d(5, 5, 1))
        self.backbone[0].requires_grad_(False)
        self.class_embed = nn.Linear(5, num_categories)
        self.box_embed = nn.Linear(5, 4)
        self.register_buffer("text_embeddings", torch.ones(num_categories, 3))

    def forward(
        self,
        images: Tensor,
        mask: Tensor,
        targets: list[Targets] | None = None,
        context: LossContext | None = None,
    ) -> Predictions | TrainingOutput:
        features = self.backbone(images).mean((2, 3))
        logits, boxes = self.class_embed(features), self.box_embed(features).sigmoid()
        if targets is None or context is None:
            return Predictions(logits[:, None], boxes[:, None])
        image = torch.cat([torch.full((len(t.labels),), i) for i, t in enumerate(targets)])
        box = torch.cat([torch.arange(len(t.labels)) for t in targets])
        class_weight = torch.tensor([t.class_weight for t in targets])[image, None]
        box_weight = torch.tensor([t.box_weight for t in targets])[image, None]
        labels = torch.cat([t.labels for t in targets])
        wanted = F.one_hot(labels.clamp(min=0), logits.shape[1]).float()
        class_loss = F.binary_cross_entropy_with_logits(logits[image], wanted, reduction="none")
        if context.class_columns is not None:
            class_loss = class_loss[:, context.class_columns]
        box_loss = (boxes[image] - torch.cat([t.boxes for t in targets])).abs()
        losses = {
            "loss/class": (class_loss * class_weight).sum() / context.num_boxes,
            "loss/box_l1": (box_loss * box_weight).sum() / context.num_boxes,
        }
        return TrainingOutput(losses, (MatchedRegions(features[image], image, box, 1.0),))

    def category_parameters(self) -> dict[str, int]:
        return {"class_embed.weight": 0, "class_embed.bias": 0, "text_embeddings": 0}


def toy_image(number: int) -> tuple[Tensor, Targets]:
    """Image `number` with 0 to 3 boxes, always the same."""
    generator = torch.Generator().manual_seed(number)
    num_boxes = number % 4
    image = torch.randint(0, 256, (3, 20, 24), generator=generator, dtype=torch.uint8)
    boxes = torch.rand(num_boxes, 4, generator=generator)
    labels = torch.randint(0, NUM_CATEGORIES, (num_boxes,), generator=generator)
    return image, Targets(boxes, labels, number, (20, 24), (20, 24), seed=number)


def toy_micro_batches(
    step: int, batch_size: int, micro_batch: int, rank: int, world_size: int
) -> list[Batch]:
    """This rank's equal part of the global batch of a step."""
    share = batch_size // world_size
    numbers = [step * batch_size + rank * share + i for i in range(share)]
    batches = []
    for start in range(0, share, micro_batch):
        images, targets = zip(*map(toy_image, numbers[start : start + micro_batch]), strict=True)
        names = [f"toy/{t.image_id}" for t in targets]
        batches.append(collate(images, targets, ["toy"] * len(images), names, 8))
    return batches


def run_ranks(function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
    """`function(*arguments)` in `world_size` new processes with a gloo group; one result each."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(
            _rank, (world_size, folder, function, arguments), nprocs=world_size
        )
        paths = [Path(folder, f"result_{rank}.pt") for rank in range(world_size)]
        return [torch.load(path, weights_only=True) for path in paths]


def _rank(
    rank: int, world_size: int, folder: str, function: Callable[..., Any], arguments: tuple
) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
    )
    torch.save(function(*arguments), Path(folder, f"result_{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()
    # Gloo's threads may still let go of tensors while the interpreter goes down, which now and
    # then aborts a process that has done all its work (pytorch/pytorch, pull request 179291).
    os._exit(0)
