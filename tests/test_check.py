"""What `longtail check` refuses before anything is spent: resources and packages."""

from pathlib import Path

import pytest
import torch
from tiny_world import tiny_recipe

from pipeline.check import check_stages
from pipeline.data.miniature import draw_world
from pipeline.errors import RecipeError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("check")
    draw_world(path / "raw", "tiny", 0)
    return path


def test_a_good_recipe_is_described(folder: Path) -> None:
    assert "tiny" in check_stages([tiny_recipe(folder, "tiny")])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluation": {"cpus": 4096}}, "evaluation.cpus is 4096, and the trainers leave"),
        ({"evaluation": {"gpus": 64}}, "evaluation.gpus 64 and the trainers' GPUs are 64"),
        ({"logging": {"wandb": "tail"}}, "logging.wandb is set, and wandb is not installed"),
        ({"logging": {"trackio": "tail"}}, "logging.trackio is set, and trackio is not installed"),
    ],
)
def test_what_is_not_there_is_refused(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, dict[str, object]],
    message: str,
) -> None:
    monkeypatch.setattr("pipeline.check.find_spec", lambda package: None)
    with pytest.raises(RecipeError, match=message):
        check_stages([tiny_recipe(folder, "tiny", **changes)])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_gpus_that_are_not_there_are_refused(folder: Path) -> None:
    recipe = tiny_recipe(folder, "tiny", cluster={"gpus_per_worker": 1})
    with pytest.raises(RecipeError, match="no GPU that torch can use"):
        check_stages([recipe])
