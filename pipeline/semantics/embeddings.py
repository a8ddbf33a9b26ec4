"""What the objective `features` learns: the embeddings that a teacher in this process gives."""

from typing import Protocol

from torch import Tensor

from pipeline.data.batch import Batch


class EmbeddingMaker(Protocol):
    """What a teacher does for this objective."""

    temperature: float

    def box_embeddings(self, batch: Batch) -> list[Tensor]:
        """Each image's (N_i, D) float32 unit rows, one for each box."""


class EmbeddingsInProcess:
    """Stands where soft labels come from (`SoftLabels`), and gives embeddings in their place."""

    batches_ahead = 0

    def __init__(self, teacher: EmbeddingMaker) -> None:
        self._teacher = teacher
        self.temperature = teacher.temperature

    def ask(self, batch: Batch) -> None:
        """Nothing: there is nobody else to work on it."""

    def labels(self, batch: Batch) -> list[Tensor]:
        """Each image's (N_i, D) float32 unit rows, on the batch's device."""
        return self._teacher.box_embeddings(batch)
