"""The student: a detector and, while it trains with soft labels, the semantic branch."""

from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
from torch import Tensor, nn

from pipeline.data.batch import Targets, normalise
from pipeline.detectors.interface import (
    Detector,
    LossContext,
    MatchedRegions,
    TrainingOutput,
)
from pipeline.recipe import Semantic

DETECTOR_PREFIX = "detector."


class Student(nn.Module):
    """Everything that trains: uint8 images and targets in, named losses out.

    `branch` is a `SemanticBranch` or None. With `precision` bfloat16 the forward pass runs under
    autocast: parameters, their gradients and the optimizer stay float32.
    """

    def __init__(
        self,
        detector: nn.Module,
        branch: nn.Module | None = None,
        semantic: Semantic | None = None,
        precision: str = "float32",
    ) -> None:
        super().__init__()
        assert (branch is None) == (semantic is None), "a branch and its section come together"
        self.detector = detector
        self.branch = branch
        self.semantic = semantic
        self.precision = precision

    def forward(
        self,
        images: Tensor,
        mask: Tensor,
        targets: list[Targets],
        context: LossContext,
        soft_labels: list[Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Losses of a micro-batch by log key, weighted; their sum is what is minimised.

        `images` is (B, 3, H, W) uint8, `mask` (B, H, W) bool with True on padding; `soft_labels`
        holds an (N_i, C) float32 tensor for each image, or what else the branch's objective learns
        (`SemanticBranch.forward`), and is needed when there is a branch, unless for hard labels.
        """
        statistics = cast(Detector, self.detector)
        floats = normalise(images, mask, statistics.pixel_mean, statistics.pixel_std)
        with self._autocast(images.device):
            output: TrainingOutput = self.detector(floats, mask, targets, context)
            losses = dict(output.losses)
            if self.branch is not None and self.semantic is not None:
                for name, matched in _semantic_regions(self.semantic, output).items():
                    loss = self.branch(
                        matched,
                        soft_labels,
                        targets,
                        context.num_boxes,
                        context.class_columns,
                        context.shares.semantics,
                    )
                    losses[name] = self.semantic.weight * loss
        return {name: loss.float() for name, loss in losses.items()}

    def _autocast(self, device: torch.device) -> AbstractContextManager[object]:
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(device.type, torch.bfloat16)


def _semantic_regions(section: Semantic, output: TrainingOutput) -> dict[str, MatchedRegions]:
    """The regions that the branch learns from, by log key: `loss/semantic` and `loss/semantic_dn`
    of the last layer, with `_0`, `_1`, ... for the earlier ones where all layers are learned."""
    layers = {"": output.matched}
    if section.layers == "all":
        layers |= {f"_{number}": regions for number, regions in enumerate(output.earlier)}
    names = ("loss/semantic", "loss/semantic_dn")[: 1 + section.denoising]
    return {
        f"{name}{suffix}": matched
        for suffix, regions in layers.items()
        for name, matched in zip(names, regions, strict=False)
    }


def export_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The detector's part of a student's weights, under the detector's own names."""
    return {
        name.removeprefix(DETECTOR_PREFIX): tensor
        for name, tensor in state.items()
        if name.startswith(DETECTOR_PREFIX)
    }
