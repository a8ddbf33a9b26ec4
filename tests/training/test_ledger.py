"""The budget of unreadable images holds over all ranks and over the whole run."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_world import prepare_here, tiny_recipe
from toy_student import run_ranks

from pipeline.data.images import decode_pixels
from pipeline.data.stream import reader as reader_module
from pipeline.data.stream.ledger import Ledger
from pipeline.data.stream.reader import Reading
from pipeline.errors import DataError, StopRequested
from pipeline.recipe import Recipe
from pipeline.training.loop import (
    join_process_group,
    share_unreadable,
    train,
    warn_of_another_decoder,
)
from pipeline.training.manifest import checkpoint_dir, read_manifest


@pytest.fixture(scope="module")
def folder(module_path: Path) -> Path:
    prepare_here(module_path)
    return module_path


@pytest.fixture(autouse=True)
def a_third_is_unreadable(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(data: bytes) -> np.ndarray:
        if sum(data[-40:]) % 3 == 0:
            raise DataError("damaged")
        return decode_pixels(data)

    monkeypatch.setattr(reader_module, "decode_pixels", decode)


def go(recipe: Recipe, stop_at: int = -1) -> None:
    device = torch.device("cpu")
    join_process_group(device)
    train(recipe, device, lambda step, loss: step == stop_at)


def unreadable_of(recipe: Recipe, step: int) -> dict[str, str]:
    return read_manifest(checkpoint_dir(recipe.run_dir, step)).unreadable


def with_budget(folder: Path, name: str, budget: int) -> Recipe:
    tree = tiny_recipe(folder, name).model_dump()
    tree["data"]["bad_sample_budget"] = budget
    return Recipe.model_validate(tree)


def test_the_budget_goes_on_where_the_run_was_stopped(folder: Path) -> None:
    whole = with_budget(folder, "whole", 100)
    go(whole)
    found = unreadable_of(whole, 8)
    by_source = [sample_id.split("/")[0] for sample_id in found]
    most = max(by_source.count(source) for source in set(by_source))
    assert most >= 4
    stopped = with_budget(folder, "stopped", most)
    with pytest.raises(StopRequested):
        go(stopped, stop_at=4)
    assert 0 < len(unreadable_of(stopped, 4)) < len(found)
    go(stopped)
    assert unreadable_of(stopped, 8) == found
    lines = [
        json.loads(line) for line in (whole.run_dir / "metrics.jsonl").read_text().splitlines()
    ]
    logged = [line["images"] for line in lines if line["event"] == "unreadable"]
    assert {key: reason for images in logged for key, reason in images.items()} == found
    # Each half is within this budget, and the run is not.
    strict = with_budget(folder, "strict", most - 1)
    with pytest.raises(StopRequested):
        go(strict, stop_at=4)
    with pytest.raises(DataError, match=rf"{most} images cannot be read.*budget {most - 1}"):
        go(strict)


def _shared(budget: int) -> list[str]:
    rank = torch.distributed.get_rank()
    ledger = Ledger(budget)
    ledger.add(Reading(unreadable=[("a", f"a/{rank}{k}", "damaged") for k in range(2)]))
    ledger.add(Reading(unreadable=[("a", "a/both", "damaged")]))
    run: Any = SimpleNamespace(stream=SimpleNamespace(ledger=ledger))
    progress: Any = SimpleNamespace(step=3)
    try:
        share_unreadable(run, progress, None)
    except DataError as error:
        return [str(error)]
    assert not ledger.unshared
    return list(ledger.unreadable)


@pytest.mark.slow
def test_ranks_share_one_budget() -> None:
    both = run_ranks(_shared, 2, 5)
    assert both[0] == both[1] == ["a/00", "a/01", "a/10", "a/11", "a/both"]
    messages = run_ranks(_shared, 2, 4)
    assert messages[0] == messages[1] and "5 images cannot be read" in messages[0][0]


def test_an_image_counts_once_and_sources_have_budgets_of_their_own() -> None:
    ledger = Ledger(2)
    ledger.merge({"a/1": "x", "b/1": "x"})
    for _ in range(3):
        ledger.add(Reading(unreadable=[("a", "a/1", "x"), ("b", "b/2", "x")]))
    assert ledger.unshared == {"b/2": "x"}
    ledger.merge(dict(ledger.unshared))
    assert sorted(ledger.unreadable) == ["a/1", "b/1", "b/2"] and not ledger.unshared
    with pytest.raises(DataError, match="source b: 3 images"):
        ledger.merge({"b/3": "y"})


def test_another_decoder_is_named_at_the_resumption(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = with_budget(folder, "decoder", 100)
    with pytest.raises(StopRequested):
        go(recipe, stop_at=1)
    manifest = read_manifest(checkpoint_dir(recipe.run_dir, 1))
    with caplog.at_level(logging.WARNING):
        warn_of_another_decoder(manifest)
        assert "decoded by" not in caplog.text
        manifest.versions["jpeg decoder"] = "pillow 9.0"
        warn_of_another_decoder(manifest)
    assert "images were decoded by pillow 9.0 up to step 1" in caplog.text
