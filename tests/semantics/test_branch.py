import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.data.batch import Targets
from pipeline.detectors.interface import MatchedRegions
from pipeline.recipe import Semantic
from pipeline.semantics.branch import SemanticBranch
from pipeline.semantics.objectives import divergence, entropy_weight

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


def by_hand(**changes: object) -> SemanticBranch:
    """Two categories along the axes and a projection that changes nothing; temperature 2."""
    section = Semantic.model_validate(changes)
    branch = SemanticBranch(2, torch.eye(2), 2.0, section)
    with torch.no_grad():
        branch.projection.weight.copy_(torch.eye(2))
    return branch


FEATURE = MatchedRegions(
    torch.tensor([[3.0, 4.0]]), torch.tensor([0]), torch.tensor([0]), torch.tensor([2.0])
)
"""Unit length (0.6, 0.8), so logits are 1.2 and 1.6 at a temperature of 2; one of two copies."""
LOG_Q = [
    1.2 - math.log(math.exp(1.2) + math.exp(1.6)),
    1.6 - math.log(math.exp(1.2) + math.exp(1.6)),
]
SOFT = (0.25, 0.75)
KL = sum(p * (math.log(p) - q) for p, q in zip(SOFT, LOG_Q, strict=True))
ENTROPY = -sum(p * math.log(p) for p in SOFT)


@pytest.mark.parametrize(
    ("changes", "taught", "expected"),
    [
        ({}, SOFT, KL),
        ({"entropy_weighting": True}, SOFT, KL * 2 * ENTROPY / math.log(2)),
        ({"labels": "hard"}, None, -LOG_Q[1]),
        ({"objective": "features"}, (0.8, -0.6), 0.2 + 1.4),
    ],
)
def test_each_objective_by_hand(
    changes: dict[str, object], taught: tuple[float, float] | None, expected: float
) -> None:
    """A box of category 1 of an image that weighs 0.5, in a batch of 4 boxes."""
    [target] = make_targets((1,))
    target = replace(target, labels=torch.tensor([1]), semantic_weight=0.5)
    given = None if taught is None else [torch.tensor([taught])]
    loss = by_hand(**changes)(FEATURE, given, [target], 4.0)
    assert float(loss.detach()) == pytest.approx(0.5 * expected / 2 / 4, rel=1e-6)


def test_divergence_over_columns_by_hand() -> None:
    """Renormalised over categories 2 and 0, and weighed by the 0.6 that the soft label has there;
    nothing for a soft label that lies elsewhere, and the chain rule for the whole."""
    logits = torch.tensor([[0.5, 3.0, -1.0], [0.5, 3.0, -1.0]], dtype=torch.float64)
    soft = torch.tensor([[0.2, 0.4, 0.4], [0.0, 1.0, 0.0]], dtype=torch.float64)
    found = divergence(logits, soft, torch.tensor([2, 0]))
    total = math.exp(0.5) + math.exp(-1)
    within = 2 / 3 * math.log(2 / 3 / (math.exp(-1) / total))
    within += 1 / 3 * math.log(1 / 3 / (math.exp(0.5) / total))
    assert found.tolist() == [pytest.approx(0.6 * within, rel=1e-12), 0]
    student = logits.softmax(-1)
    outside = soft[0, 1] * (soft[0, 1] / student[0, 1]).log()
    inside = 0.6 * (0.6 / (1 - student[0, 1])).log()
    whole = divergence(logits, soft)
    torch.testing.assert_close(whole[0], found[0] + outside + inside)
    everything = divergence(logits, soft, torch.tensor([1, 2, 0]))
    torch.testing.assert_close(everything, whole)


def test_gradient_of_each_objective_equals_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, generator=generator, dtype=torch.float64).requires_grad_()
    soft = torch.randn(3, 5, generator=generator, dtype=torch.float64).softmax(-1)
    for columns in (None, torch.tensor([4, 1, 2])):
        assert torch.autograd.gradcheck(lambda x, c=columns: divergence(x, soft, c), logits)
    weight = entropy_weight(torch.tensor([[1.0, 0, 0, 0], [0.25] * 4, [0.5, 0.5, 0, 0]]))
    torch.testing.assert_close(weight, torch.tensor([0.0, 2.0, 1.0]))


def test_hard_labels_leave_boxes_without_a_category_out() -> None:
    branch, regions = by_hand(labels="hard"), make_regions()
    regions = regions._replace(features=regions.features[:, :2].detach().requires_grad_())
    targets = make_targets()
    labels = [torch.tensor([0, 1]), torch.tensor([], dtype=torch.int64), torch.tensor([-1, 1, -1])]
    targets = [replace(t, labels=label) for t, label in zip(targets, labels, strict=True)]
    branch(regions, None, targets, 5.0).backward()
    assert regions.features.grad is not None
    taught = regions.features.grad.abs().sum(1) > 0
    assert taught.tolist() == [True, True, False, False, True]  # boxes 1, 0 and 2, 0, 1


def test_federated_columns_are_those_of_the_step() -> None:
    branch = SemanticBranch(2, torch.eye(4, 2), 2.0, Semantic(columns="federated"))
    soft = [torch.tensor([[0.1, 0.2, 0.3, 0.4]])]
    columns = torch.tensor([3, 0])
    features = branch.projection(FEATURE.features)
    logits = 2 * F.linear(F.normalize(features, dim=-1), torch.eye(4, 2))
    expected = divergence(logits, soft[0], columns).sum() / 2
    found = branch(FEATURE, soft, make_targets((1,)), 1.0, columns)
    torch.testing.assert_close(found, expected)
    whole = branch(FEATURE, soft, make_targets((1,)), 1.0, None)
    torch.testing.assert_close(whole, divergence(logits, soft[0]).sum() / 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "features", "columns": "federated"}, "columns federated belongs to"),
        ({"objective": "features", "labels": "hard"}, "labels hard belongs to objective logits"),
        ({"labels": "hard", "entropy_weighting": True}, "entropy_weighting reads soft labels"),
        ({"objective": "features", "entropy_weighting": True}, "entropy_weighting reads soft"),
    ],
)
def test_what_has_no_meaning_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Semantic.model_validate(changes)
