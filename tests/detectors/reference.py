"""Reference arrays of the public implementations, and our detector with their inputs.

A file holds the public model's `state/...` under its own names, and for each batch its inputs,
outputs and losses. They come from the public code on a CPU, with its own PyTorch form of deformable
attention, random weights, and two constants that assume 256 channels made relative to the width.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from pipeline.data.batch import Targets
from pipeline.detectors import build_detector
from pipeline.detectors.backbone import FeatureMap, resize_mask
from pipeline.detectors.dino import denoising, detector, losses
from pipeline.detectors.dino.detector import DinoDetector
from pipeline.detectors.dino.matcher import Matches
from pipeline.detectors.interface import LossContext, TrainingOutput
from pipeline.detectors.published.converted import Converted
from pipeline.recipe import DetectorSection

FOLDER = Path(__file__).parent / "references"
TERMS = {"ce": "class", "bbox": "box_l1", "giou": "box_giou"}


@dataclass(frozen=True)
class Reference:
    """Arrays of one file, without those of batches or with those of one batch."""

    arrays: Mapping[str, Tensor]
    options: Mapping[str, Any]

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.arrays[name]
        return tensor.long() if tensor.dtype == torch.int32 else tensor

    def under(self, prefix: str) -> dict[str, Tensor]:
        """Arrays whose names start with `prefix`, without it."""
        return {
            name.removeprefix(prefix): self[name] for name in self.arrays if name.startswith(prefix)
        }

    def batch(self, name: str) -> "Reference":
        return Reference(self.under(f"{name}/"), self.options)


def read_reference(name: str) -> Reference:
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        arrays = {key: file.get_tensor(key) for key in file.keys()}
        return Reference(arrays, json.loads(file.metadata()["section"]))


class GivenMaps(nn.Module):
    """Stands in for the backbone: gives the reference's maps."""

    def __init__(self, maps: list[Tensor]) -> None:
        super().__init__()
        self.maps = maps

    def forward(self, images: Tensor, mask: Tensor) -> list[FeatureMap]:
        return [FeatureMap(x, resize_mask(mask, (x.shape[2], x.shape[3]))) for x in self.maps]


def section_of(reference: Reference, class_head: Mapping[str, Any]) -> DetectorSection:
    """Our section for the public model's options."""
    options = reference.options
    levels = options["num_feature_levels"]
    return DetectorSection.model_validate(
        {
            "backbone": {
                "name": "resnet10t",
                "weights": None,
                "frozen_stages": 0,
                "out_indices": list(range(6 - levels, 5)),
                "arguments": {"channels": [2, 2, 2, 2], "stem_width": 2},
            },
            "hidden_dim": options["hidden_dim"],
            "num_heads": options["nheads"],
            "num_points": options["enc_n_points"],
            "num_feature_levels": levels,
            "encoder_layers": options["enc_layers"],
            "decoder_layers": options["dec_layers"],
            "ffn_dim": options["dim_feedforward"],
            "num_queries": options["num_queries"],
            "class_head": class_head,
            "denoising": {
                "num_queries": 2 * options["dn_number"],
                "label_noise": options["dn_label_noise_ratio"],
                "box_noise": options["dn_box_noise_scale"],
            },
        }
    )


def load_converted(
    section: DetectorSection, converted: Converted, num_categories: int, text: Tensor | None
) -> DinoDetector:
    """A detector with the converted weights, all of them, its backbone still to be replaced."""
    model = build_detector(section, num_categories=num_categories, text_embeddings=text)
    for i, projection in enumerate(model.input_proj):
        assert isinstance(projection, nn.Sequential)
        projection[0] = nn.Conv2d(
            converted.weights[f"input_proj.{i}.0.weight"].shape[1],
            section.hidden_dim,
            **({"kernel_size": 1} if i < len(section.backbone.out_indices) else COARSER),
        )
    model.backbone = GivenMaps([])
    given = dict(converted.weights)
    if text is not None:
        given["text_embeddings"] = text
    model.load_state_dict(given)
    return model


COARSER: dict[str, Any] = {"kernel_size": 3, "stride": 2, "padding": 1}


def images_of(batch: Reference) -> tuple[Tensor, Tensor]:
    """Images of the reference's sizes and their mask; the pixels are not looked at."""
    sizes = batch["mask_sizes"].tolist()
    height, width = (max(side) for side in zip(*sizes, strict=True))
    mask = torch.ones(len(sizes), height, width, dtype=torch.bool)
    for i, (h, w) in enumerate(sizes):
        mask[i, :h, :w] = False
    return torch.zeros(len(sizes), 3, height, width), mask


def targets_of(batch: Reference, first_label: int = 0) -> list[Targets]:
    """Targets whose seed is the number of the image, by which `inject_noise` finds its noise."""
    parts = zip(batch["boxes"], batch["labels"], batch["mask_sizes"].tolist(), strict=True)
    return [
        Targets(boxes, labels - first_label, i, (h, w), (h, w), seed=i)
        for i, (boxes, labels, (h, w)) in enumerate(parts)
    ]


def inject_noise(monkeypatch: pytest.MonkeyPatch, batch: Reference, first_label: int = 0) -> None:
    """Put the public model's random numbers in the place of our own draws."""
    drawn = batch.under("noise/")

    def draw(section: Any, target: Targets, num_categories: int) -> denoising.Noise:
        noise = original(section, target, num_categories)
        used = drawn["flip"].shape[1]
        assert used == int((noise.group >= 0).sum())
        flip, label, shift = (x.clone() for x in (noise.flip, noise.label, noise.shift))
        flip[:used] = drawn["flip"][target.seed] < section.label_noise * 0.5
        label[:used] = drawn["label"][target.seed] - first_label
        size = drawn["size"][target.seed] + (~noise.positive[:used, None])
        shift[:used] = drawn["sign"][target.seed] * size * section.box_noise
        return noise._replace(flip=flip, label=label, shift=shift)

    original = denoising.draw_noise
    monkeypatch.setattr(denoising, "draw_noise", draw)


@dataclass
class Seen:
    """What the detector handed to its criterion, and what that gave."""

    output: TrainingOutput
    outputs: losses.Outputs
    matches: Matches


def train(
    monkeypatch: pytest.MonkeyPatch,
    model: DinoDetector,
    batch: Reference,
    columns: Tensor | None = None,
    first_label: int = 0,
) -> Seen:
    """One training forward on the reference's inputs, with its noise."""
    seen: list[Any] = []

    def spy(section: Any, outputs: losses.Outputs, *rest: Any) -> Any:
        result = original(section, outputs, *rest)
        seen.extend([outputs, result[1]])
        return result

    original = losses.compute_losses
    monkeypatch.setattr(detector, "compute_losses", spy)
    inject_noise(monkeypatch, batch, first_label)
    model.backbone = GivenMaps([batch[f"maps/{i}"] for i in range(len(batch.under("maps/")))])
    targets = targets_of(batch, first_label)
    context = LossContext(float(sum(len(target.labels) for target in targets)), columns)
    output = model(*images_of(batch), targets, context)
    assert isinstance(output, TrainingOutput)
    return Seen(output, seen[0], seen[1])


def reference_losses(batch: Reference, section: DetectorSection) -> dict[str, Tensor]:
    """The public losses of class and box under our log keys, times our weights."""
    weights = {
        "class": section.losses.weight_class,
        "box_l1": section.losses.weight_box_l1,
        "box_giou": section.losses.weight_box_giou,
    }
    named = {}
    for name, value in batch.under("loss/loss_").items():
        term, _, suffix = name.partition("_")
        if term not in TERMS:
            continue
        suffix = suffix.replace("interm", "encoder")
        ours = TERMS[term]
        named[f"loss/{ours}{'_' if suffix else ''}{suffix}"] = weights[ours] * value
    return named


def assert_equal(ours: Tensor, theirs: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)
