"""Soft labels in process, and batches as they travel."""

import pickle

import torch
from torch import Tensor

from pipeline.data.batch import Batch, Targets, collate
from pipeline.semantics.soft_labels import InProcess, PackedBatch
from pipeline.semantics.sparse import SparseLabels


def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = [
        torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator)
        for size in ((40, 50), (33, 70))
    ]
    targets = [
        Targets(
            torch.rand(number, 4, generator=generator),
            torch.arange(number),
            number,
            image.shape[1:],
            image.shape[1:],
        )
        for number, image in zip((3, 0), images, strict=True)
    ]
    return collate(images, targets, ["a", "a"], ["a/1", "a/2"])


class Drawn:
    temperature = 7.0

    def soft_labels(self, batch: Batch) -> list[Tensor]:
        generator = torch.Generator().manual_seed(int(batch.images.sum()))
        return [
            torch.randn(len(target.boxes), 9, generator=generator).softmax(dim=1)
            for target in batch.targets
        ]


def test_in_process_gives_what_the_teacher_does() -> None:
    given, exact = InProcess(Drawn(), None).labels(batch()), Drawn().soft_labels(batch())
    assert [torch.equal(a, b) for a, b in zip(given, exact, strict=True)] == [True, True]
    source = InProcess(Drawn(), 2)
    source.ask(batch())
    sparse = source.labels(batch())
    assert [tuple(part.shape) for part in sparse] == [(3, 9), (0, 9)]
    assert torch.equal(sparse[0], SparseLabels.of(exact[0], 2).dense("cpu"))
    assert source.temperature == 7.0 and source.batches_ahead == 0


def test_a_batch_arrives_as_it_was_sent() -> None:
    sent = batch()
    packed = PackedBatch.of(sent)
    assert packed.images.base is not None, "pixels are not copied"
    for array in (packed.images, packed.mask):
        array.flags.writeable = False
    came = pickle.loads(pickle.dumps(packed)).batch()
    assert torch.equal(came.images, sent.images) and torch.equal(came.mask, sent.mask)
    assert came.images.stride() == sent.images.stride()
    assert came.sample_ids == sent.sample_ids
    for ours, theirs in zip(came.targets, sent.targets, strict=True):
        for name, value in vars(theirs).items():
            same = getattr(ours, name)
            assert torch.equal(same, value) if isinstance(value, Tensor) else same == value, name
