"""Soft labels: equal to open_clip where it can say, neutral to padding, indifferent to company."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from far_device import soft_labels_far_away
from safetensors.torch import save_file
from torch.nn.functional import normalize

from pipeline.data.batch import Batch, Targets, collate, normalise
from pipeline.errors import RecipeError, StorageError
from pipeline.recipe import Source, TeacherTraining
from pipeline.recipe import Teacher as TeacherSection
from pipeline.semantics.clip import load_clip, new_clip
from pipeline.semantics.teacher import (
    MANIFEST_FILE,
    WEIGHTS_FILE,
    Teacher,
    teacher_hash,
    trained_weights,
)
from pipeline.semantics.text import text_embeddings
from pipeline.semantics.towers.resnet import attention_pool

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
WHOLE = torch.tensor([[0.5, 0.5, 1.0, 1.0]])


def saved(model: torch.nn.Module, path: Path) -> Path:
    """Weights with statistics and gains that are not at their initial values."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in model.state_dict().items():
        if "bn" in name and tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    save_file(model.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def section(tmp_path_factory: pytest.TempPathFactory) -> TeacherSection:
    torch.manual_seed(0)
    path = saved(new_clip("miniature-rn"), tmp_path_factory.mktemp("weights") / "w.safetensors")
    return TeacherSection(model="miniature-rn", pretrained=str(path), prompts="single")


def embeddings(number: int = 5, width: int = 64) -> torch.Tensor:
    return normalize(torch.randn(number, width, generator=torch.Generator().manual_seed(2)), dim=-1)


def picture(height: int, width: int, seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def targets(boxes: torch.Tensor, size: tuple[int, int]) -> Targets:
    return Targets(boxes, torch.zeros(len(boxes), dtype=torch.int64), 1, size, size)


def batch_of(*pairs: tuple[torch.Tensor, torch.Tensor], divisor: int = 32) -> Batch:
    images = [image for image, _ in pairs]
    given = [targets(boxes, (image.shape[1], image.shape[2])) for image, boxes in pairs]
    return collate(images, given, ["a"] * len(pairs), ["a/1"] * len(pairs), divisor)


@pytest.mark.parametrize(("width", "heads", "grid"), [(64, 4, 2), (256, 8, 7)])
def test_folded_attention_pool_equals_open_clip(width: int, heads: int, grid: int) -> None:
    from open_clip.modified_resnet import AttentionPool2d

    torch.manual_seed(0)
    pool = AttentionPool2d(grid, width, heads, 32)
    for projection in (pool.q_proj, pool.k_proj, pool.v_proj, pool.c_proj):
        torch.nn.init.normal_(projection.bias)
    regions = torch.randn(6, width, grid, grid)
    torch.testing.assert_close(attention_pool(pool, regions), pool(regions), atol=1e-5, rtol=1e-5)


def test_whole_image_is_what_open_clip_sees(section: TeacherSection) -> None:
    """A box over all of an image of the model's own size: RoIAlign has nothing to interpolate."""
    teacher, image = Teacher(section, embeddings(), None, "cpu"), picture(64, 64)
    ours = teacher.soft_labels(batch_of((image, WHOLE)))[0]
    model = load_clip(section, None)
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    features = model.encode_image(((image / 255 - mean) / std)[None], normalize=True)
    expected = (model.logit_scale.exp() * features @ embeddings().T).softmax(dim=-1)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    assert teacher.temperature == pytest.approx(float(model.logit_scale.exp()))


def test_soft_labels_are_distributions_for_each_box(section: TeacherSection) -> None:
    teacher = Teacher(section, embeddings(), None, "cpu")
    boxes = torch.tensor([[0.3, 0.4, 0.2, 0.5], [0.6, 0.5, 0.5, 0.9], [0.5, 0.5, 1.0, 1.0]])
    batch = batch_of((picture(70, 90), boxes), (picture(50, 64), boxes[:0]))
    first, second = teacher.soft_labels(batch)
    assert first.shape == (3, 5) and second.shape == (0, 5)
    assert first.dtype == torch.float32 and not first.requires_grad
    torch.testing.assert_close(first.sum(dim=1), torch.ones(3))
    assert len(first.unique(dim=0)) == 3
    empty = teacher.soft_labels(batch_of((picture(50, 64), boxes[:0])))
    assert [tuple(labels.shape) for labels in empty] == [(0, 5)]


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_it_waits_for_nothing(section: TeacherSection, scale: float) -> None:
    teacher = Teacher(section.model_copy(update={"image_scale": scale}), embeddings(), None, "cpu")
    boxes = torch.tensor([[0.3, 0.4, 0.2, 0.5], [0.6, 0.5, 0.5, 0.9], [0.5, 0.5, 1.0, 1.0]])
    batch = batch_of((picture(70, 90), boxes), (picture(50, 64), boxes[:0]))
    expected = teacher.soft_labels(batch)
    found, waits = soft_labels_far_away(teacher, batch)
    assert waits == []
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("scale", [1.0, 1.5, 0.75])
def test_padding_and_company_change_nothing(section: TeacherSection, scale: float) -> None:
    """A small image beside a large one, or padded by itself, gets the labels that it gets alone."""
    changed = section.model_copy(update={"image_scale": scale})
    teacher = Teacher(changed, embeddings(), None, "cpu")
    box = torch.tensor([[0.2, 0.2, 0.25, 0.25], [0.9, 0.9, 0.2, 0.2]])
    small, large = picture(250, 241), picture(320, 384, seed=4)
    alone = teacher.soft_labels(batch_of((small, box)))[0]
    beside = teacher.soft_labels(batch_of((small, box), (large, box)))[0]
    swapped = teacher.soft_labels(batch_of((large, box), (small, box)))[1]
    assert torch.equal(beside, alone) and torch.equal(swapped, alone)


def test_boxes_that_teach_no_semantics_are_not_read(section: TeacherSection) -> None:
    images = [picture(64, 64, 1), picture(64, 64, 2)]
    learned = targets(WHOLE, (64, 64))
    padding = replace(learned, semantic_weight=0.0)
    teacher = Teacher(section, embeddings(), None, "cpu")
    both = teacher.soft_labels(collate(images, [learned, learned], ["a", "b"], ["a", "b"]))
    one = teacher.soft_labels(collate(images, [learned, padding], ["a", "b"], ["a", "b"]))
    torch.testing.assert_close(one[0], both[0])
    assert one[1].tolist() == [[pytest.approx(0.2)] * 5] and both[1].std() > 0


def test_what_padding_holds_does_not_matter(section: TeacherSection) -> None:
    teacher = Teacher(section, embeddings(), None, "cpu")
    batch = batch_of((picture(50, 60), WHOLE))
    expected = teacher.soft_labels(batch)[0]
    batch.images[batch.mask[:, None].expand_as(batch.images)] = 255
    assert torch.equal(teacher.soft_labels(batch)[0], expected)


def test_any_size_and_scale_follow_the_object(section: TeacherSection) -> None:
    """The image doubled and seen at half the scale is the image, whatever the odd sizes."""
    image, box = picture(96, 128), torch.tensor([[0.4, 0.5, 0.5, 0.6]])
    doubled = image.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    plain = Teacher(section, embeddings(), None, "cpu").soft_labels(batch_of((image, box)))[0]
    half = section.model_copy(update={"image_scale": 0.5})
    halved = Teacher(half, embeddings(), None, "cpu").soft_labels(batch_of((doubled, box)))[0]
    torch.testing.assert_close(plain, halved, atol=0.05, rtol=0)
    for height, width in ((33, 47), (10, 200)):
        odd = batch_of((picture(height, width), WHOLE), divisor=1)
        assert Teacher(section, embeddings(), None, "cpu").soft_labels(odd)[0].isfinite().all()


def test_a_region_is_read_where_it_lies(section: TeacherSection) -> None:
    """Changing pixels far from a box leaves its labels; changing those inside does not."""
    teacher, box = Teacher(section, embeddings(), None, "cpu"), torch.tensor([[0.1, 0.1, 0.1, 0.1]])
    image = picture(512, 512)
    expected = teacher.soft_labels(batch_of((image, box)))[0]
    far, near = image.clone(), image.clone()
    far[:, 400:, 400:] = 0
    near[:, 26:77, 26:77] = 0
    torch.testing.assert_close(teacher.soft_labels(batch_of((far, box)))[0], expected)
    assert not torch.allclose(teacher.soft_labels(batch_of((near, box)))[0], expected, atol=1e-4)


def test_embeddings_must_be_as_wide_as_the_model(section: TeacherSection) -> None:
    with pytest.raises(RecipeError, match=r"\(5, 32\).*'miniature-rn'.*64 wide"):
        Teacher(section, embeddings(width=32), None, "cpu")


def test_teacher_is_no_module_and_holds_no_text_tower(section: TeacherSection) -> None:
    teacher = Teacher(section, embeddings(), None, "cpu")
    holder = torch.nn.Module()
    holder.teacher = teacher
    assert not list(holder.parameters()) and not holder.state_dict()
    assert not any(hasattr(value, "token_embedding") for value in vars(teacher).values())


@pytest.mark.slow
def test_rn50_from_a_local_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(new_clip("RN50").state_dict(), tmp_path / "rn50.pt")
    section = TeacherSection(model="RN50", pretrained=str(tmp_path / "rn50.pt"), prompts="single")
    rows = text_embeddings(section, ["dog", "cat"], None, tmp_path)
    assert rows.shape == (2, 1024)
    teacher = Teacher(section, rows, None, "cpu")
    ours = teacher.soft_labels(batch_of((picture(224, 224), WHOLE)))[0]
    pixels = normalise(picture(224, 224)[None], torch.zeros(1, 224, 224).bool(), MEAN, STD)
    expected = normalize(load_clip(section, None).visual(pixels), dim=-1) @ rows.T
    torch.testing.assert_close(
        ours, (teacher.temperature * expected).softmax(dim=-1), atol=1e-5, rtol=1e-4
    )


def test_trained_weights_are_found_whole_or_not_at_all(tmp_path: Path) -> None:
    assert trained_weights(tmp_path / "absent") is None
    (tmp_path / WEIGHTS_FILE).write_bytes(b"12345")
    assert trained_weights(tmp_path) is None
    digest = hashlib.sha256(b"12345").hexdigest()
    (tmp_path / MANIFEST_FILE).write_text(json.dumps({"sha256": digest}))
    assert trained_weights(tmp_path) == tmp_path / WEIGHTS_FILE
    for damaged in (b"1234", b"12346"):
        (tmp_path / WEIGHTS_FILE).write_bytes(damaged)
        with pytest.raises(StorageError, match="delete"):
            trained_weights(tmp_path)
    (tmp_path / MANIFEST_FILE).write_text('{"sha256": ')
    with pytest.raises(StorageError, match="delete"):
        trained_weights(tmp_path)


def test_hash_follows_model_training_and_captions() -> None:
    captions = Source(name="cc", format="cc3m", images="i", annotations="a.tsv")

    def section(**changes: object) -> TeacherSection:
        training = TeacherTraining.model_validate({"captions": captions, **changes})
        return TeacherSection(model="miniature-rn", pretrained=None, train=training)

    plain = teacher_hash(section(), "digest")
    assert plain == teacher_hash(section(), "digest") and len(plain) == 16
    assert plain != teacher_hash(section(), "other")
    assert plain != teacher_hash(section(steps=7), "digest")
    moved = captions.model_copy(update={"name": "moved"})
    assert plain == teacher_hash(section(captions=moved), "digest"), "the digest says what is read"


def test_names_that_are_most_alike_are_told(section: TeacherSection) -> None:
    rows = embeddings()
    rows[3] = normalize(rows[1] + 0.1 * rows[2], dim=0)
    teacher = Teacher(section, rows, None, "cpu")
    one, other, cosine = teacher.closest_names()
    assert (one, other) == (1, 3) and cosine == pytest.approx(float(rows[1] @ rows[3]))
