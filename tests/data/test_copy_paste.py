"""Pasted boxes hold what they held, and boxes below them end where they are still seen."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from coloured_world import SMALL, VOCABULARY, a_stream, draw_record, some_data
from drawn_pictures import drawn, extent, generator

from pipeline.data.copy_paste import Pasted, copy_paste
from pipeline.data.shards.index import Index, write_index
from pipeline.data.shards.preparing import ShardTask, write_shard
from pipeline.data.stream.reader import HIDDEN
from pipeline.data.transforms import Picture, as_boxes
from pipeline.recipe import Transforms

PASTING = Transforms(copy_paste_probability=1.0)


def pixels_of(picture: Picture, box: torch.Tensor) -> torch.Tensor:
    left, top, right, bottom = box.round().int().tolist()
    return picture.image[:, top:bottom, left:right]


def pasted(picture: Picture, partner: Picture, seed: int, **changed: object) -> Pasted:
    return copy_paste(picture, partner, PASTING.model_copy(update=changed), generator(seed))


@pytest.mark.parametrize("seed", range(40))
def test_every_box_is_the_extent_of_its_pixels(seed: int) -> None:
    # The labels of the one are not those of the other; a hidden share of 1 leaves all that is seen.
    picture = drawn((120, 160), [(10, 20, 80, 110), (90, 5, 150, 60)], [0, 1])
    partner = drawn((200, 150), [(20, 20, 120, 90), (10, 120, 70, 190)], [2, 3])
    before = picture.image.clone()
    result = pasted(picture, partner, seed, copy_paste_hidden=1.0)
    found = result.picture
    assert 1 <= result.num_pasted <= 2
    assert torch.equal(picture.image, before), "the picture that is given stays as it is"
    assert found.size == (120, 160)
    for label in range(4):
        seen = extent(found, label)
        boxes = found.boxes[found.labels == label]
        assert len(boxes) == (seen is not None)
        if seen is not None:
            # A resize mixes colours at the edge.
            assert boxes[0].tolist() == pytest.approx(seen, abs=1.5)
    low, high = found.boxes[:, :2], found.boxes[:, 2:]
    assert (low >= 0).all() and (high <= torch.tensor([160, 120])).all() and (high > low).all()


def test_boxes_that_are_covered_are_left_out_and_counted() -> None:
    # The partner is one box, and pastes are half of each side: a quarter of the picture.
    picture = drawn((100, 100), [(0, 0, 100, 100), (45, 45, 55, 55)], [0, 1])
    partner = drawn((100, 100), [(0, 0, 100, 100)], [2])
    hidden = 0
    for seed in range(60):
        result = pasted(picture, partner, seed, copy_paste_scales=(1.0, 1.0), flip_probability=0.0)
        found = result.picture
        assert result.num_pasted == 1
        assert found.labels.tolist()[0] == 0 and found.boxes[0].tolist() == [0, 0, 100, 100]
        [box] = found.boxes[found.labels == 2]
        assert (box[2:] - box[:2]).tolist() == [50, 50]
        covered = torch.minimum(box[2:], torch.tensor(55.0)) - torch.maximum(
            box[:2], torch.tensor(45.0)
        )
        share = covered.clamp(min=0).prod().item() / 100
        assert result.num_hidden == (share > 0.7) == (1 not in found.labels.tolist())
        hidden += result.num_hidden
    assert 5 < hidden < 55


def test_a_box_ends_where_a_paste_covers_a_whole_side_of_it() -> None:
    picture = drawn((100, 100), [(10, 40, 91, 61)], [0])
    exact = torch.tensor([[10.25, 40.5, 90.5, 60.75]])
    picture = replace(picture, boxes=as_boxes(exact, picture.size))
    partner = drawn((100, 100), [(0, 0, 100, 100)], [2])
    moved = 0
    for seed in range(80):
        found = pasted(picture, partner, seed, copy_paste_scales=(1.0, 1.0)).picture
        [paste] = found.boxes[found.labels == 2].tolist()
        boxes = found.boxes[found.labels == 0].tolist()
        if not boxes:
            continue
        [box] = boxes
        expected = [10.25, 40.5, 90.5, 60.75]
        if paste[1] <= 40 and paste[3] >= 61:
            if paste[0] <= 10 < paste[2]:
                expected[0] = paste[2]
                moved += 1
            elif paste[2] >= 91 > paste[0]:
                expected[2] = paste[0]
                moved += 1
        if paste[0] <= 10 and paste[2] >= 91:
            raise AssertionError("a paste is no wider than half of the picture")
        if box[1] == 40.5 and box[3] == 60.75:
            assert box == expected
    assert moved >= 5


def test_other_boxes_of_the_partner_come_along_when_they_are_mostly_inside() -> None:
    # Label 1 lies inside label 0; label 2 has a fifth inside, label 3 four fifths.
    partner = drawn(
        (100, 100),
        [(0, 0, 50, 100), (10, 10, 30, 30), (40, 0, 90, 20), (30, 60, 55, 80)],
        [0, 1, 2, 3],
    )
    picture = drawn((100, 100), [], [])
    seen, directions = set(), set()
    for seed in range(40):
        result = pasted(picture, partner, seed, copy_paste_boxes=1, copy_paste_scales=(1.0, 1.0))
        labels = sorted(result.picture.labels.tolist())
        seen.add(tuple(labels))
        if 0 in labels:
            assert labels == [0, 1, 3]
            left = {k: result.picture.boxes[result.picture.labels == k][0] for k in labels}
            whole, inner, cut = left[0], left[1], left[3]
            size = (whole[2:] - whole[:2]).tolist()
            assert size == [25, 50], "a box is no more than half of a side"
            assert (inner[2:] - inner[:2]).tolist() == [10, 10]
            assert (cut[2:] - cut[:2]).tolist() == [10, 10]
            assert inner.tolist() == pytest.approx(extent(result.picture, 1), abs=1)
            mirrored = bool(inner[0] - whole[0] > 7)
            directions.add(mirrored)
            assert (inner[0] - whole[0]).item() == (10 if mirrored else 5)
            assert cut[0 if mirrored else 2] == whole[0 if mirrored else 2]
    assert directions == {False, True}
    assert seen == {(0, 1, 3), (1,), (2,), (3,)}


def test_each_category_of_the_partner_is_as_likely_as_any_other_and_each_of_its_boxes() -> None:
    # Widths tell the boxes of the crowd apart.
    crowd = [(0, 10 * k, 5 + 2 * k, 10 * k + 9) for k in range(9)]
    partner = drawn((100, 100), [*crowd, (50, 50, 90, 90)], [0] * 9 + [1])
    picture = drawn((100, 100), [], [])
    changed = {"copy_paste_boxes": 1, "copy_paste_scales": (1.0, 1.0)}
    found = [pasted(picture, partner, seed, **changed).picture for seed in range(300)]
    assert all(len(each.labels) == 1 for each in found)
    rare = sum(each.labels.tolist() == [1] for each in found)
    assert 120 < rare < 180
    widths = Counter((b[2] - b[0]).item() for p in found for b in p.boxes[p.labels == 0])
    assert set(widths) == {5 + 2 * k for k in range(9)} and max(widths.values()) < 40


def test_nothing_to_paste_and_nowhere_to_see_it() -> None:
    empty, full = drawn((50, 60), [], []), drawn((50, 60), [(0, 0, 60, 50)], [1])
    for seed in range(20):
        result = pasted(full, empty, seed)
        assert (result.num_pasted, result.num_hidden) == (0, 0)
        assert torch.equal(result.picture.image, full.image)
        assert pasted(empty, full, seed).picture.labels.tolist() == [1]
        # Three pixels of a thousand would be less than one.
        tiny = drawn((1000, 1000), [(5, 5, 8, 8)], [2])
        assert pasted(full, tiny, seed).num_pasted == 0
    for size in ((1, 1), (1, 400), (400, 1), (3, 1000)):
        thin = drawn(size, [(0, 0, size[1], size[0])], [0])
        for seed in range(10):
            assert pasted(thin, full, seed).picture.size == size
            assert pasted(full, thin, seed).picture.size == (50, 60)


def test_only_the_given_generator_decides_what_is_pasted() -> None:
    picture = drawn((80, 90), [(10, 20, 60, 70)], [0])
    partner = drawn((80, 90), [(20, 10, 60, 70), (0, 0, 15, 15)], [1, 2])
    torch.manual_seed(0)
    first = pasted(picture, partner, 7).picture
    torch.manual_seed(1)
    np.random.seed(1)
    second = pasted(picture, partner, 7).picture
    assert torch.equal(first.image, second.image) and torch.equal(first.boxes, second.boxes)
    images = {pasted(picture, partner, seed).picture.image.numpy().tobytes() for seed in range(9)}
    assert len(images) == 9


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """Every second image says that there is no leaf and no sky, the others no leaf; odd ones lack
    apples, and one is coarse."""
    folder = tmp_path_factory.mktemp("listed")
    rng = np.random.default_rng(4)
    records = []
    for i in range(6):
        record = draw_record(folder, "train", i, [3] if i % 2 else [3, 3, 8], rng)
        absent, partial = ((5, 8), ()) if i % 2 else ((5,), (8,))
        record = replace(
            record,
            negative_category_ids=absent,
            not_exhaustive_category_ids=partial,
            coarse=i == 4,
        )
        records.append(record)
    url = str(folder / "train")
    info = write_shard(ShardTask(f"{url}/000000.tar", tuple(records), "inputs"))
    shards = [(info.shard, info.columns)]
    return write_index(url, "train", VOCABULARY, shards, inputs_digest="inputs", report={})


def test_lists_of_categories_hold_for_both_images(listed: Index, tmp_path: Path) -> None:
    pasting = SMALL.model_copy(update={"copy_paste_probability": 0.7, "crop_probability": 0.0})
    data = some_data(transforms=pasting, extra=[], repeat_threshold=0)
    stream = a_stream({"train": listed}, data)
    leaf, sky = VOCABULARY.column_of(5), VOCABULARY.column_of(8)
    kinds: dict[str, int] = {"alone": 0, "coarse": 0, "pasted": 0}
    hidden = 0
    for step in stream.iterate(0, 40):
        slots = stream.plan.step(step.step, 0, 1)
        targets = [target for batch in step.micro_batches for target in batch.targets]
        hidden += step.dropped[HIDDEN]
        for slot, target in zip(slots, targets, strict=True):
            images = [slot.index, *slot.partners]
            assert len(images) == 1 or slot.partners[0] in range(6)
            if len(images) == 2 and images[1] == 4:
                kinds["coarse"] += 1
                images = images[:1]
            kinds["pasted" if len(images) == 2 else "alone"] += 1
            no_sky = all(i % 2 for i in images)
            assert target.negative_categories == ((leaf, sky) if no_sky else (leaf,))
            assert target.not_exhaustive_categories == (() if no_sky else (sky,))
            assert target.coarse == (images[0] == 4)
            if len(images) == 2:
                assert len(target.labels) >= 1
    assert min(kinds.values()) > 10 and kinds["pasted"] > 90
    assert hidden > 0
