"""A small detector and random batches for it."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_dino import NUM_CATEGORIES, SMALL
from torch import Tensor

from pipeline.data.batch import Targets
from pipeline.detectors import build_detector
from pipeline.detectors.dino.detector import DinoDetector
from pipeline.recipe import DetectorSection


@pytest.fixture
def make_section() -> Callable[..., DetectorSection]:
    """The section of a small detector, with changes at its first level."""

    def make(**changes: Any) -> DetectorSection:
        return DetectorSection.model_validate(SMALL | changes)

    return make


@pytest.fixture
def make_detector(make_section: Callable[..., DetectorSection]) -> Callable[..., DinoDetector]:
    """A small detector of the same random weights each time."""

    def make(text_dim: int = 16, **changes: Any) -> DinoDetector:
        torch.manual_seed(0)
        text = F.normalize(torch.randn(NUM_CATEGORIES, text_dim), dim=-1)
        section = make_section(**changes)
        return build_detector(section, num_categories=NUM_CATEGORIES, text_embeddings=text)

    return make


@pytest.fixture
def make_targets() -> Callable[..., list[Targets]]:
    """Targets with the given numbers of boxes; image i is the same whatever the others are."""

    def make(counts: Sequence[int], size: int = 64, **changes: Any) -> list[Targets]:
        targets = []
        for i, count in enumerate(counts):
            generator = torch.Generator().manual_seed(100 + i)
            centre = torch.rand(count, 2, generator=generator) * 0.5 + 0.25
            extent = torch.rand(count, 2, generator=generator) * 0.4 + 0.05
            labels = torch.randint(NUM_CATEGORIES, (count,), generator=generator)
            fields: dict[str, Any] = {"seed": 7 * i + 1} | changes
            targets.append(
                Targets(
                    torch.cat([centre, extent], 1), labels, i, (size, size), (size, size), **fields
                )
            )
        return targets

    return make


@pytest.fixture
def images() -> tuple[Tensor, Tensor]:
    """Four random images of 64x64 without padding."""
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randn(4, 3, 64, 64, generator=generator)
    return pixels, torch.zeros(4, 64, 64, dtype=torch.bool)
