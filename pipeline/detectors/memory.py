"""What training keeps of a model whatever the images are: weights, gradients, AdamW's moments."""

from typing import NamedTuple

from torch import nn

FLOAT32_BYTES = 4


class TrainingMemory(NamedTuple):
    """Bytes of one worker without ZeRO, activations not counted."""

    weights: int
    """Parameters, frozen ones too, and buffers."""
    gradients: int
    optimizer: int
    """Two moments of each trainable parameter."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


def training_memory(model: nn.Module) -> TrainingMemory:
    """Bytes that training holds of a model in float32, which may be on the meta device.

    Gradients and moments are of trainable parameters only; AdamW's step counters, 4 bytes for each
    parameter, are left out. ZeRO divides optimizer, gradients and weights among workers at its
    stages 1, 2 and 3.
    """
    parameters = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    return TrainingMemory(
        parameters * FLOAT32_BYTES + buffers,
        trainable * FLOAT32_BYTES,
        2 * trainable * FLOAT32_BYTES,
    )
