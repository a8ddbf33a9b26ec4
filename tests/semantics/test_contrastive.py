"""Training from scratch: it learns, it repeats itself exactly, and it publishes whole or not."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy, normalize

from pipeline.data.batch import Targets, collate
from pipeline.data.sample import Sample
from pipeline.errors import DataError, RecipeError
from pipeline.recipe import Source, Teacher, TeacherTraining
from pipeline.semantics import contrastive
from pipeline.semantics.contrastive import train_teacher
from pipeline.semantics.teacher import Teacher as FrozenTeacher
from pipeline.semantics.teacher import trained_weights
from pipeline.semantics.text import text_embeddings

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}


class FewCaptions:
    """Plain squares of three colours, as an index of shards would give them."""

    digest = "squares"

    def __init__(self, number: int = 48, captions: Sequence[str | None] = ()) -> None:
        self.num_samples = number
        self._captions = list(captions) or [f"a {name} square" for name in COLOURS]

    def read(self, index: int, /) -> Sample:
        tone = list(COLOURS.values())[index % 3]
        rng = np.random.default_rng(index)
        pixels = np.clip(np.array(tone) + rng.normal(0, 20, (40, 44, 3)), 0, 255)
        file = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
        return Sample(
            key=str(index),
            image=file.getvalue(),
            extension="png",
            image_id=index,
            width=44,
            height=40,
            boxes=np.zeros((0, 4), np.float32),
            category_ids=np.zeros(0, np.int64),
            caption=self._captions[index % len(self._captions)],
        )


def section(**changes: object) -> Teacher:
    source = Source(name="cc", format="cc3m", images="i", annotations="a.tsv")
    values = {"captions": source, "steps": 20, "batch_size": 12, "warmup_steps": 2, **changes}
    training = TeacherTraining.model_validate(values)
    return Teacher(model="miniature-rn", pretrained=None, train=training, prompts="single")


def test_learns_to_name_regions(tmp_path: Path) -> None:
    """A canvas of three plain regions, none seen in training, each named by its own colour."""
    seen: list[tuple[int, int, float]] = []
    weights = train_teacher(
        section(steps=40),
        FewCaptions(),
        tmp_path / "teacher",
        lambda *news: seen.append(news),
        progress_every=10,
    )
    assert [(step, steps) for step, steps, _ in seen] == [(10, 40), (20, 40), (30, 40), (40, 40)]
    rows = text_embeddings(
        section(steps=40), [f"{name} square" for name in COLOURS], weights, tmp_path
    )
    teacher = FrozenTeacher(section(steps=40), rows, weights, "cpu")
    canvas = torch.cat(
        [torch.tensor(tone, dtype=torch.uint8)[:, None, None].expand(3, 64, 64)
         for tone in COLOURS.values()],
        dim=2,
    )  # fmt: skip
    boxes = torch.tensor([[(i + 0.5) / 3, 0.5, 1 / 3, 1.0] for i in range(3)])
    targets = Targets(boxes, torch.arange(3), 1, (64, 192), (64, 192))
    labels = teacher.soft_labels(collate([canvas], [targets], ["x"], ["x/1"]))[0]
    assert labels.argmax(dim=1).tolist() == [0, 1, 2]


def test_same_inputs_give_the_same_weights(tmp_path: Path) -> None:
    torch.manual_seed(1)
    first = load_file(train_teacher(section(steps=3), FewCaptions(), tmp_path / "a"))
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = load_file(train_teacher(section(steps=3), FewCaptions(), tmp_path / "b"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(torch.get_rng_state(), before), "nobody else's random numbers move"


def test_a_trained_teacher_is_reused(tmp_path: Path) -> None:
    train_teacher(section(steps=2), FewCaptions(), tmp_path / "a")

    class Unread(FewCaptions):
        def read(self, index: int, /) -> Sample:
            pytest.fail("captions read again")

    again = train_teacher(section(steps=2), Unread(), tmp_path / "a")
    assert again == trained_weights(tmp_path / "a")


def test_an_interrupted_training_leaves_nothing(tmp_path: Path) -> None:
    def stop(step: int, steps: int, loss: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_teacher(section(), FewCaptions(), tmp_path / "a", stop, progress_every=1)
    assert trained_weights(tmp_path / "a") is None and not list(tmp_path.iterdir())


@pytest.mark.parametrize("batch_size", [49, 10])
def test_batches_must_fit_the_captions(tmp_path: Path, batch_size: int) -> None:
    with pytest.raises(RecipeError, match=r"batch_size.*(49|multiple of 4)"):
        train_teacher(section(batch_size=batch_size), FewCaptions(), tmp_path / "a")


def test_images_without_captions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no caption"):
        train_teacher(section(), FewCaptions(captions=["a dog", None]), tmp_path / "a")


def test_loss_leaves_out_what_is_no_negative() -> None:
    """Captions of equal words, or of fewer of the same, are not told from the image's own."""
    generator = torch.Generator().manual_seed(0)
    image = normalize(torch.randn(4, 8, generator=generator), dim=-1)
    text = normalize(torch.randn(4, 8, generator=generator), dim=-1)
    scale = torch.tensor(10.0)
    distinct = torch.tensor([[9, 1, 2, 0], [9, 1, 3, 0], [9, 4, 2, 0], [9, 4, 3, 0]])
    own, logits = torch.arange(4), 10 * image @ text.T
    plain = (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2
    torch.testing.assert_close(contrastive._contrastive_loss(image, text, scale, distinct), plain)
    # Caption 1 repeats caption 0; caption 3 says less than captions 0 and 1.
    said = torch.tensor([[9, 1, 2, 0], [9, 1, 2, 0], [9, 4, 3, 0], [9, 1, 0, 0]])
    masked = logits.clone()
    masked[0, 1] = masked[1, 0] = masked[0, 3] = masked[1, 3] = -torch.inf
    expected = (cross_entropy(masked, own) + cross_entropy(masked.T, own)) / 2
    torch.testing.assert_close(contrastive._contrastive_loss(image, text, scale, said), expected)


def test_batches_visit_every_caption_once_an_epoch() -> None:
    tokens = torch.randint(1, 30, (64, 6), generator=torch.Generator().manual_seed(0))
    training = section(steps=8, batch_size=16).train
    assert training is not None
    batches = contrastive._batches(np.random.default_rng(0), tokens, training)
    assert len(batches) == 8
    for epoch in (batches[:4], batches[4:]):
        assert sorted(torch.cat(epoch).tolist()) == list(range(64))
    assert not torch.equal(batches[0], batches[4])


def test_cells_of_collages_hold_their_images() -> None:
    """Images of one flat tone each: every cell shows its own, and rows come back in order."""
    tones = torch.arange(8, dtype=torch.uint8) * 30
    images = tones[:, None, None, None].expand(8, 3, 72, 72).contiguous()
    collages, boxes = contrastive._collages(np.random.default_rng(3), images, 48)
    assert collages.shape == (2, 3, 96, 96) and len(boxes) == 2
    areas = (boxes[0][:, 2:] - boxes[0][:, :2]).prod(dim=1)
    assert float(areas.sum()) == 96 * 96
    means = torch.stack(
        [collages[i, :, int(y0) : int(y1), int(x0) : int(x1)].float().mean()
         for i in range(2) for x0, y0, x1, y1 in boxes[i]]
    )  # fmt: skip
    restored = contrastive._by_cell(means[:, None])[:, 0]
    torch.testing.assert_close(restored, tones.float())
