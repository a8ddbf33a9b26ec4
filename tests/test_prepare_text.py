"""Text embeddings of many prompts are made once, before training workers need them."""

from collections.abc import Callable
from pathlib import Path
from threading import Event

import pytest
import torch
from tiny_world import prepare_here, tiny_recipe

from pipeline import run
from pipeline.data.shards.preparing import load_index, shards_url
from pipeline.recipe import Recipe
from pipeline.semantics import text
from pipeline.semantics.text import cached_text, text_embeddings
from pipeline.training.build import cache_dir, teacher_weights


@pytest.fixture(scope="module")
def folder(module_path: Path) -> Path:
    prepare_here(module_path)
    return module_path


def test_many_are_made_once_and_few_by_the_workers(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(folder, "any", teacher={"prompts": "seven"})
    names = load_index(shards_url(recipe.data, recipe.data.vocabulary_source)).vocabulary.names
    told: list[tuple[int, int, str]] = []

    def in_this_process(
        function: Callable[[Recipe, Callable[..., None]], None], given: Recipe, *_: object
    ) -> None:
        function(given, lambda *news: told.append(news))

    monkeypatch.setattr(run, "run_alone", in_this_process)
    run._prepare_text(recipe, Event())
    assert told == [], "84 prompts are few"
    monkeypatch.setattr(run, "_FEW_PROMPTS", 83)
    run._prepare_text(recipe, Event())
    assert told == [(84, 84, "")]
    weights, cache = teacher_weights(recipe), cache_dir(recipe)
    assert cached_text(recipe.teacher, names, weights, cache).is_file()
    monkeypatch.setattr(text, "_embed", lambda *_: pytest.fail("made again"))
    run._prepare_text(recipe, Event())
    found = text_embeddings(recipe.teacher, names, weights, cache)
    assert found.shape == (12, 64)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(12))
