from collections.abc import Callable
from typing import Any

import torch

from pipeline.data.batch import Targets
from pipeline.detectors.dino.detector import DinoDetector
from pipeline.detectors.interface import LossContext, TrainingOutput
from pipeline.detectors.memory import training_memory


def test_bytes_equal_those_of_a_step(
    make_detector: Callable[..., DinoDetector],
    make_targets: Callable[..., list[Targets]],
    images: tuple[torch.Tensor, torch.Tensor],
) -> None:
    backbone: dict[str, Any] = {
        "name": "resnet10t",
        "weights": None,
        "norm": "own",
        "frozen_stages": 2,
        "arguments": {"channels": [16, 24, 32, 48], "stem_width": 8},
    }
    detector = make_detector(backbone=backbone)
    expected = training_memory(detector)
    optimizer = torch.optim.AdamW(p for p in detector.parameters() if p.requires_grad)
    output = detector(*images, make_targets([1, 2, 0, 1]), LossContext(4.0, None))
    assert isinstance(output, TrainingOutput)
    torch.stack(list(output.losses.values())).sum().backward()
    optimizer.step()
    parameters = list(detector.parameters())
    kept = [*parameters, *detector.buffers()]
    gradients = [p.grad for p in parameters if p.grad is not None]
    states = list(optimizer.state.values())
    moments = [state[key] for state in states for key in ("exp_avg", "exp_avg_sq")]

    def size(tensors: list[torch.Tensor]) -> int:
        return sum(t.untyped_storage().nbytes() for t in tensors)

    assert (size(kept), size(gradients), size(moments)) == expected
    assert expected.total == sum(expected) and expected.gradients < expected.weights
