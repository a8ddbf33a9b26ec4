from collections.abc import Callable

import torch

from pipeline.data.batch import Targets
from pipeline.detectors.boxes import cxcywh_to_xyxy
from pipeline.detectors.dino.denoising import DenoisingLayout, make_denoising
from pipeline.recipe import Denoising

MakeTargets = Callable[..., list[Targets]]
SECTION = Denoising(num_queries=20, label_noise=0.5, box_noise=0.5)


def layout_of(targets: list[Targets], section: Denoising = SECTION) -> DenoisingLayout:
    return make_denoising(section, targets, num_categories=12)


def test_groups_fill_the_fixed_number_of_queries(make_targets: MakeTargets) -> None:
    layout = layout_of(make_targets([3, 1, 0, 10]))
    # 20 // (2 * 3) = 3 groups of 6; 10 groups of 2; none; one group of 20.
    used = (layout.group >= 0).sum(1)
    assert used.tolist() == [18, 20, 0, 20]
    assert (layout.group.amax(1) + 1).tolist() == [3, 10, 0, 1]
    assert layout.weight.amax(1).tolist() == torch.tensor([1 / 3, 1 / 10, 0, 1]).tolist()
    assert (layout.weight[0, 18:] == 0).all() and (layout.weight[2] == 0).all()
    for image, count in enumerate([3, 1, 0, 10]):
        mine = layout.image == image
        for group in layout.group[image, layout.query[mine]].unique():
            boxes = layout.box[mine & (layout.group[image][layout.query] == group)]
            assert sorted(boxes.tolist()) == list(range(count))


def test_each_box_weighs_one_whatever_the_groups(make_targets: MakeTargets) -> None:
    layout = layout_of(make_targets([3, 1, 0, 7]))
    for image, count in enumerate([3, 1, 0, 7]):
        mine = layout.image == image
        total = torch.zeros(8).index_add_(
            0, layout.box[mine], layout.weight[image, layout.query[mine]]
        )
        torch.testing.assert_close(total[:count], torch.ones(count))
        assert (total[count:] == 0).all()


def test_more_boxes_than_fit_are_drawn_evenly(make_targets: MakeTargets) -> None:
    total = torch.zeros(25)
    for seed in range(300):
        layout = layout_of(make_targets([25], seed=seed))
        assert len(layout.box.unique()) == len(layout.box) == 10
        total.index_add_(0, layout.box, layout.weight[0, layout.query])
    torch.testing.assert_close(total / 300, torch.ones(25), atol=0.3, rtol=0)
    torch.testing.assert_close(total.mean() / 300, torch.tensor(1.0))


def test_positives_stay_near_and_negatives_go_farther(make_targets: MakeTargets) -> None:
    targets = make_targets([2, 4])
    layout = layout_of(targets)
    for image, target in enumerate(targets):
        count = len(target.labels)
        for query in range(int((layout.group[image] >= 0).sum())):
            box = query % count
            half = target.boxes[box, 2:] / 2
            corners = cxcywh_to_xyxy(target.boxes[box])
            moved = cxcywh_to_xyxy(layout.boxes[image, query]) - corners
            shift = moved.abs() / torch.cat([half, half])
            inside = (corners + moved).clamp(0.001, 0.999) == corners + moved
            if query % (2 * count) < count:
                assert (shift <= 0.5 + 1e-4).all()
            else:
                assert (shift[inside] >= 0.5 - 1e-4).all() and (shift <= 1 + 1e-4).all()


def test_label_noise_flips_half_of_its_ratio(make_targets: MakeTargets) -> None:
    section = Denoising(num_queries=4000, label_noise=0.5, box_noise=0.0)
    targets = make_targets([4])
    layout = layout_of(targets, section)
    kept = layout.labels[layout.image, layout.query] == targets[0].labels[layout.box]
    # A quarter is redrawn, a twelfth of that onto the same label.
    assert abs(float(kept.float().mean()) - (1 - 0.25 * 11 / 12)) < 0.03
    torch.testing.assert_close(
        layout.boxes[layout.image, layout.query], targets[0].boxes[layout.box]
    )


def test_unlabelled_boxes_get_a_random_label(make_targets: MakeTargets) -> None:
    target = make_targets([4])[0]
    blind = Targets(target.boxes, torch.full((4,), -1), 0, (64, 64), (64, 64), seed=3)
    layout = layout_of([blind], Denoising(num_queries=400, label_noise=0.0))
    assert layout.labels.min() >= 0 and len(layout.labels.unique()) == 12


def test_noise_depends_on_the_seed_alone(make_targets: MakeTargets) -> None:
    together, alone = layout_of(make_targets([3, 2, 5])), layout_of(make_targets([3, 2, 5])[1:2])
    assert torch.equal(together.boxes[1:2], alone.boxes)
    assert torch.equal(together.labels[1:2], alone.labels)
    torch.manual_seed(99)
    assert torch.equal(layout_of(make_targets([3, 2, 5])).boxes, together.boxes)
    other = layout_of(make_targets([3, 2, 5], seed=12345))
    assert not torch.equal(other.boxes[1], together.boxes[1])


def test_attention_stays_inside_the_group(make_targets: MakeTargets) -> None:
    layout = layout_of(make_targets([3, 0]))
    mask = layout.attention_mask(num_matching=5)
    assert mask.shape == (2, 20, 25) and mask[:, :, 20:].all()
    same = torch.block_diag(*[torch.ones(6, 6)] * 3, torch.zeros(2, 2)).bool()
    assert torch.equal(mask[0, :, :20], same)
    assert not mask[1, :, :20].any()
