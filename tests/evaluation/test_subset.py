"""The images of live evaluations: every rare category, the same each time."""

import numpy as np
import pytest
from federated_scenes import draw_annotations

from pipeline.evaluation.ground_truth import GroundTruth, parse_ground_truth
from pipeline.evaluation.subset import stratified_subset


@pytest.fixture(scope="module")
def truth() -> GroundTruth:
    return parse_ground_truth(draw_annotations(3, num_images=200, num_categories=45))


def columns_in(truth: GroundTruth, image_ids: np.ndarray) -> set[int]:
    return set(truth.column[np.isin(truth.image_ids[truth.image], image_ids)].tolist())


def columns_of(truth: GroundTruth, frequency: str) -> set[int]:
    group = {i for i, value in enumerate(truth.frequencies) if value == frequency}
    return group & set(truth.column.tolist())


def test_every_category_is_in_as_far_as_the_images_reach(truth: GroundTruth) -> None:
    chosen = stratified_subset(truth, 60)
    assert len(chosen) == 60 == len(set(chosen.tolist()))
    assert (np.diff(chosen) > 0).all() and np.isin(chosen, truth.image_ids).all()
    assert columns_in(truth, chosen) == set(truth.column.tolist())


def test_rare_categories_are_in_even_when_they_need_more_images(truth: GroundTruth) -> None:
    few = stratified_subset(truth, 2)
    assert 2 < len(few) < 15
    assert columns_of(truth, "r") <= columns_in(truth, few)
    assert len(stratified_subset(truth, 12)) == 12


def test_it_is_a_function_of_number_and_seed(truth: GroundTruth) -> None:
    first = stratified_subset(truth, 40, seed=1)
    assert np.array_equal(first, stratified_subset(truth, 40, seed=1))
    assert not np.array_equal(first, stratified_subset(truth, 40, seed=2))


@pytest.mark.parametrize("number", [0, 200, 5000])
def test_all_images(truth: GroundTruth, number: int) -> None:
    assert np.array_equal(stratified_subset(truth, number), truth.image_ids)


def test_images_without_ground_truth_fill_the_rest() -> None:
    empty = parse_ground_truth(draw_annotations(3, num_images=9) | {"annotations": []})
    assert len(stratified_subset(empty, 4)) == 4
