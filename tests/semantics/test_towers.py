"""Each kind of tower reads regions as a plain reading does, box by box and in float64, and nothing
outside of an image takes part."""

from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch
from far_device import soft_labels_far_away
from miniature_towers import ALL, DENSE, known, stirred, width_of, written
from plain_regions import plain_crops, plain_dense
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize
from torchvision.ops import roi_align

from pipeline.data.batch import Batch, Targets, collate
from pipeline.errors import RecipeError
from pipeline.recipe import Teacher as TeacherSection
from pipeline.semantics.clip import load_clip, model_config, new_clip, pixel_statistics
from pipeline.semantics.teacher import Teacher
from pipeline.semantics.towers import crops
from pipeline.semantics.towers.choice import describe_regions, region_reader, regions_of
from pipeline.semantics.towers.regions import positions, to_cells

READINGS = [(name, "dense") for name in DENSE] + [(name, "crops") for name in ALL]
BOXES = torch.tensor(
    [[0.5, 0.5, 1.0, 1.0], [0.3, 0.4, 0.2, 0.5], [0.6, 0.45, 0.5, 0.9], [0.99, 0.98, 0.02, 0.04],
     [0.1, 0.1, 0.2, 0.2]]
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(module_path: Path) -> Path:
    known()
    return module_path


def picture(height: int, width: int, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def batch_of(*pairs: tuple[Tensor, Tensor], divisor: int = 32) -> Batch:
    given = []
    for image, boxes in pairs:
        size = (image.shape[1], image.shape[2])
        labels = torch.zeros(len(boxes), dtype=torch.int64)
        given.append(Targets(boxes, labels, 1, size, size))
    images = [image for image, _ in pairs]
    return collate(images, given, ["a"] * len(pairs), ["a/1"] * len(pairs), divisor)


def teacher_of(name: str, folder: Path, **options: object) -> Teacher:
    text = torch.randn(6, width_of(name), generator=torch.Generator().manual_seed(2))
    return Teacher(written(name, folder, **options), normalize(text, dim=-1), None, "cpu")


def corners(boxes: Tensor, height: int, width: int) -> Tensor:
    sides = torch.tensor([width, height, width, height])
    return torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], 1) * sides


def normalised(image: Tensor, section: TeacherSection) -> Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in pixel_statistics(section))
    return (image / 255 - mean) / std


@pytest.mark.parametrize(("name", "way"), READINGS)
def test_regions_equal_a_plain_reading(name: str, way: str, folder: Path) -> None:
    image, section = picture(64, 96), written(name, folder, regions=way)
    pixels, boxes = normalised(image, section), corners(BOXES, 64, 96)
    model = load_clip(section, None)
    found = region_reader(section, model_config(name), model.visual)(pixels[None], [boxes])
    if way == "dense":
        expected = plain_dense(name, model, pixels, boxes)
    else:
        expected = plain_crops(model, model_config(name)["vision_cfg"]["image_size"], pixels, boxes)
    assert len(normalize(expected, dim=-1).round(decimals=2).unique(dim=0)) == len(BOXES)
    expected = normalize(expected, dim=-1)
    torch.testing.assert_close(normalize(found, dim=-1).double(), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("name", "way"), READINGS)
def test_teacher_gives_what_its_reader_reads(name: str, way: str, folder: Path) -> None:
    """From uint8 and fractions of a padded image to labels, for images of two sizes."""
    teacher, section = teacher_of(name, folder, regions=way), written(name, folder, regions=way)
    first, second = picture(64, 96), picture(96, 32, seed=5)
    labels = teacher.soft_labels(batch_of((first, BOXES), (second, BOXES[:0]), (second, BOXES[1:])))
    reader = region_reader(section, model_config(name), load_clip(section, None).visual)
    for image, boxes, ours in ((first, BOXES, labels[0]), (second, BOXES[1:], labels[2])):
        height, width = image.shape[1:]
        rows = reader(normalised(image, section)[None], [corners(boxes, height, width)])
        cosines = cosine_similarity(rows[:, None], teacher._text[None], dim=-1)
        expected = (teacher.temperature * cosines).softmax(-1)
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-3)
    assert labels[1].shape == (0, 6)


@pytest.mark.parametrize(
    ("name", "way"), [pair for pair in READINGS if pair != ("miniature-vit", "dense")]
)
def test_the_whole_image_is_what_open_clip_sees(name: str, way: str, folder: Path) -> None:
    section = written(name, folder, regions=way)
    size = model_config(name)["vision_cfg"]["image_size"]
    image, model = picture(size, size), load_clip(section, None)
    teacher = teacher_of(name, folder, regions=way)
    ours = teacher.box_embeddings(batch_of((image, BOXES[:1])))[0]
    seen = model.visual(normalised(image, section)[None])
    expected = normalize(seen[0] if isinstance(seen, tuple) else seen, dim=-1)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("name", "way"), READINGS)
def test_neither_padding_nor_company_changes_anything(name: str, way: str, folder: Path) -> None:
    teacher = teacher_of(name, folder, regions=way)
    image, other = picture(50, 70), picture(130, 200, seed=7)
    alone = teacher.soft_labels(batch_of((image, BOXES), divisor=1))[0]
    for batch in (
        batch_of((image, BOXES), divisor=128),
        batch_of((image, BOXES), (other, BOXES)),
        batch_of((image, BOXES), (other, BOXES[:0])),
    ):
        batch.images[batch.mask[:, None].expand_as(batch.images)] = 255
        assert torch.equal(teacher.soft_labels(batch)[0], alone)
    together = batch_of((picture(50, 70, seed=9), BOXES), (image, BOXES))
    torch.testing.assert_close(teacher.soft_labels(together)[1], alone, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("name", "way"), READINGS)
def test_many_boxes_are_read_in_bounded_parts(
    name: str, way: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = teacher_of(name, folder, regions=way)
    generator = torch.Generator().manual_seed(4)
    size = 0.1 + 0.3 * torch.rand(600, 2, generator=generator)
    boxes = torch.cat([size / 2 + (1 - size) * torch.rand(600, 2, generator=generator), size], 1)
    expected = teacher.soft_labels(batch_of((picture(64, 64), boxes[590:])))[0]
    parts: list[int] = []

    def counted(features: Tensor, rows: Tensor, *args: object, **options: object) -> Tensor:
        parts.append(len(rows))
        return roi_align(features, rows, *args, **options)

    for module in ("regions", "resnet"):
        monkeypatch.setattr(f"pipeline.semantics.towers.{module}.roi_align", counted)
    monkeypatch.setattr(crops, "_PIXELS_AT_ONCE", 100 * 64 * 64)
    found = teacher_of(name, folder, regions=way).soft_labels(batch_of((picture(64, 64), boxes)))
    assert len(parts) > 1 and max(parts) < 450 and sum(parts) == 600
    torch.testing.assert_close(found[0][590:], expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("name", "way"), READINGS)
def test_it_waits_for_no_device(name: str, way: str, folder: Path) -> None:
    teacher = teacher_of(name, folder, regions=way)
    batch = batch_of((picture(50, 70), BOXES), (picture(64, 64), BOXES[:0]))
    expected = teacher.soft_labels(batch)
    found, waits = soft_labels_far_away(teacher, batch)
    assert waits == []
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_positions_of_another_grid_are_open_clips() -> None:
    class Visual:
        grid_size = (3, 5)

    class Model:
        visual = Visual

    table = torch.randn(1 + 16, 8, generator=torch.Generator().manual_seed(0))
    state = {"visual.positional_embedding": table}
    open_clip.model.resize_pos_embed(state, Model)
    torch.testing.assert_close(
        positions(table, (4, 4), (3, 5)), state["visual.positional_embedding"]
    )
    assert positions(table, (4, 4), (4, 4)) is table


def test_images_become_whole_cells_and_boxes_go_along() -> None:
    pixels = torch.arange(30.0).expand(1, 1, 20, 30)
    same, rows = to_cells(pixels[..., :16, :24], [torch.tensor([[8.0, 0, 24, 16]])], 8, 1.0)
    assert same.shape[-2:] == (16, 24) and rows.tolist() == [[0, 1, 0, 3, 2]]
    resized, rows = to_cells(pixels, [torch.tensor([[0.0, 0, 30, 20], [15, 10, 30, 20]])], 8, 2.0)
    assert resized.shape[-2:] == (40, 64)
    assert rows.tolist() == [[0, 0, 0, 8, 5], [0, 4, 2.5, 8, 5]]
    small, rows = to_cells(pixels, [torch.tensor([[0.0, 0, 30, 20]])], 8, 0.01)
    assert small.shape[-2:] == (8, 8) and rows.tolist() == [[0, 0, 0, 1, 1]]


def test_a_scale_makes_the_tower_see_more(folder: Path) -> None:
    """A picture of flat quarters, seen at twice its size: the same labels, from four times the
    tokens."""
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    image[0, :32], image[1, :, 32:], image[2, 32:] = 200, 150, 220
    box = torch.tensor([[0.25, 0.25, 0.25, 0.25]])
    doubled = image.repeat_interleave(2, 1).repeat_interleave(2, 2)
    for name in DENSE:
        twice = teacher_of(name, folder, regions="dense", image_scale=2.0)
        plain = teacher_of(name, folder, regions="dense")
        ours = twice.box_embeddings(batch_of((image, box)))[0]
        expected = plain.box_embeddings(batch_of((doubled, box)))[0]
        assert float(cosine_similarity(ours, expected)) > 0.99, name


def test_the_bias_of_siglip_cancels_and_its_scale_is_its_own(folder: Path) -> None:
    teacher, model = teacher_of("miniature-map", folder), stirred("miniature-map")
    scale, bias = model.logit_scale.detach().exp(), model.logit_bias.detach()
    assert teacher.temperature == pytest.approx(float(scale)) and float(scale) > 120
    assert float(bias) == -10
    batch = batch_of((picture(40, 48), BOXES))
    logits = scale * teacher.box_embeddings(batch)[0] @ teacher._text.T + bias
    torch.testing.assert_close(teacher.soft_labels(batch)[0], logits.softmax(-1))


@pytest.mark.parametrize(
    ("model", "chosen"),
    [
        ("RN50", "dense"), ("RN101", "dense"), ("RN50x4", "dense"), ("RN50x16", "dense"),
        ("RN50x64", "dense"), ("RN50-quickgelu", "dense"), ("miniature-rn", "dense"),
        ("ViT-B-32", "crops"), ("ViT-B-16", "crops"), ("ViT-L-14", "crops"),
        ("ViT-L-14-336", "crops"), ("ViT-H-14", "crops"), ("ViT-L-14-CLIPA", "crops"),
        ("ViT-B-16-SigLIP", "crops"), ("ViT-SO400M-14-SigLIP-384", "crops"),
        ("ViT-B-32-SigLIP2-256", "crops"), ("convnext_base_w", "dense"),
        ("convnext_large_d_320", "dense"), ("EVA02-B-16", "crops"), ("PE-Core-L-14-336", "crops"),
        ("MobileCLIP-S1", "crops"), ("coca_ViT-B-32", "crops"), ("ViTamin-L", "crops"),
        ("swin_base_patch4_window7_224", "crops"),
    ],
)  # fmt: skip
def test_auto_decides_for_each_tower_and_says_so(model: str, chosen: str) -> None:
    section = TeacherSection(model=model, pretrained="x")
    assert regions_of(section, model_config(model)) == chosen
    assert describe_regions(section, model_config(model)).startswith(
        f"regions {chosen}, chosen for this tower: "
    )
    given = section.model_copy(update={"regions": "crops"})
    assert "resized to" in describe_regions(given, model_config(model))


def test_every_model_of_open_clip_has_a_way() -> None:
    for model in open_clip.list_models():
        section = TeacherSection(model=model, pretrained="x")
        assert regions_of(section, model_config(model)) in ("dense", "crops")


def test_a_way_that_a_tower_does_not_have_is_refused(folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"regions is dense.*'miniature-captioner'.*crops or"):
        teacher_of("miniature-captioner", folder, regions="dense")
    with pytest.raises(RecipeError, match=r"image_scale is 2.*'miniature-vit'.*to 1, or"):
        teacher_of("miniature-vit", folder, image_scale=2.0)


Reading = Callable[[Tensor, list[Tensor]], Tensor]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT-B-16-SigLIP", "convnext_base", "ViT-B-32"])
def test_towers_of_full_size(name: str) -> None:
    """Random weights: the whole image is open_clip's, and any other resolution gives regions."""
    torch.manual_seed(0)
    visual, config = new_clip(name).visual.eval(), model_config(name)
    dense = TeacherSection(model=name, pretrained="x", regions="dense")
    section = dense if name != "ViT-B-32" else dense.model_copy(update={"regions": "crops"})
    reader: Reading = region_reader(section, config, visual)
    size = config["vision_cfg"]["image_size"]
    pixels = torch.randn(1, 3, size, size)
    with torch.no_grad():
        ours = reader(pixels, [torch.tensor([[0.0, 0, size, size]])])
        torch.testing.assert_close(ours, visual(pixels), atol=1e-3, rtol=1e-3)
        for way in ("dense", "crops"):
            chosen = section.model_copy(update={"regions": way})
            rows = region_reader(chosen, config, visual)(
                torch.randn(1, 3, 150, 250), [torch.tensor([[20.0, 30, 90, 70], [0, 0, 9, 9]])]
            )
            assert rows.shape == (2, config["embed_dim"]) and rows.isfinite().all()
