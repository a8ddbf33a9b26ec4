from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.data.batch import Targets
from pipeline.detectors.interface import MatchedRegions
from pipeline.semantics.branch import SemanticBranch

DIM, TEXT_DIM, CATEGORIES = 6, 10, 5


def make_branch() -> SemanticBranch:
    torch.manual_seed(0)
    text = F.normalize(torch.randn(CATEGORIES, TEXT_DIM), dim=-1)
    return SemanticBranch(DIM, text, temperature=10.0)


def make_regions() -> MatchedRegions:
    generator = torch.Generator().manual_seed(1)
    image, box = torch.tensor([0, 0, 2, 2, 2]), torch.tensor([1, 0, 2, 0, 1])
    features = torch.randn(5, DIM, generator=generator).requires_grad_()
    return MatchedRegions(features, image, box, torch.ones(5))


def make_targets(counts: tuple[int, ...] = (2, 0, 3)) -> list[Targets]:
    labels = [torch.zeros(n, dtype=torch.int64) for n in counts]
    return [Targets(torch.rand(len(x), 4), x, 0, (8, 8), (8, 8)) for x in labels]


def student(branch: SemanticBranch, features: Tensor) -> Tensor:
    cosine = F.cosine_similarity(
        branch.projection(features)[:, None], branch.text_embeddings, dim=-1
    )
    return (10 * cosine).softmax(-1)


def soft_labels() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(n, CATEGORIES, generator=generator).softmax(-1) for n in (2, 0, 3)]


def test_divergence_is_zero_for_the_same_distribution() -> None:
    branch, regions = make_branch(), make_regions()
    mine = student(branch, regions.features).detach()
    order = [torch.stack([mine[1], mine[0]]), mine[:0], torch.stack([mine[3], mine[4], mine[2]])]
    loss = branch(regions, order, make_targets(), 5.0)
    torch.testing.assert_close(loss, torch.zeros(()), atol=1e-5, rtol=0)
    order[0] = order[0].flip(0)
    assert float(branch(regions, order, make_targets(), 5.0).detach()) > 1e-3


def test_sum_is_forward_divergence_over_boxes_copies_and_weights() -> None:
    branch, regions, soft = make_branch(), make_regions(), soft_labels()
    teacher = torch.stack([soft[0][1], soft[0][0], soft[2][2], soft[2][0], soft[2][1]])
    each = (teacher * (teacher.log() - student(branch, regions.features).log())).sum(-1)
    copies = torch.tensor([1.0, 1.0, 4.0, 4.0, 4.0])
    targets = make_targets()
    targets[0] = replace(targets[0], semantic_weight=0.5)
    expected = (each * torch.tensor([0.5, 0.5, 1, 1, 1]) / copies).sum() / 7
    loss = branch(regions._replace(copies=copies), soft, targets, 7.0)
    torch.testing.assert_close(loss, expected)


def test_gradient_reaches_branch_and_features_only() -> None:
    branch, regions, soft = make_branch(), make_regions(), soft_labels()
    branch(regions, soft, make_targets(), 5.0).backward()
    assert regions.features.grad is not None and regions.features.grad.abs().sum() > 0
    assert branch.projection.weight.grad is not None
    assert not branch.text_embeddings.requires_grad
    assert list(branch.state_dict()) == ["projection.weight"]


def test_hard_soft_labels_are_safe() -> None:
    branch, regions = make_branch(), make_regions()
    hard = [torch.eye(CATEGORIES)[torch.arange(n)] for n in (2, 0, 3)]
    loss = branch(regions, hard, make_targets(), 5.0)
    loss.backward()
    assert loss.isfinite() and regions.features.grad is not None
    assert regions.features.grad.isfinite().all()


def test_no_regions_still_touch_the_projection() -> None:
    branch = make_branch()
    none = torch.zeros(0, dtype=torch.int64)
    regions = MatchedRegions(torch.zeros(0, DIM), none, none, torch.ones(0))
    empty = [torch.zeros(0, CATEGORIES)] * 3
    branch(regions, empty, make_targets((0, 0, 0)), 5.0).backward()
    assert branch.projection.weight.grad is not None
    assert (branch.projection.weight.grad == 0).all()
