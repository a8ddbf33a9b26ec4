"""The ledger of samples: what counted, what is lost, repeated and redone, of made-up and real."""

import json
from pathlib import Path

import pytest
import torch
from tiny_world import prepare_here, tiny_recipe

from pipeline.data.shards.preparing import load_index, shards_url
from pipeline.data.stream.batches import Stream
from pipeline.errors import StopRequested
from pipeline.training.loop import train
from pipeline.training.samples import SampleLedger, read_samples

Line = dict[str, object]


def begin(attempt: int, start: int, world_size: int = 2) -> Line:
    return {"attempt": attempt, "start": start, "world_size": world_size}


def step(attempt: int, number: int, *seeds: int, loss: str = "a") -> Line:
    samples = [[f"train/{seed}", seed] for seed in seeds or (10 * number, 10 * number + 1)]
    return {"attempt": attempt, "step": number, "samples": samples, "loss": loss}


def ledger(folder: Path, *ranks: list[Line]) -> SampleLedger:
    folder.mkdir(exist_ok=True)
    for rank, lines in enumerate(ranks):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"samples_rank{rank}.jsonl").write_text(text)
    return read_samples(folder)


@pytest.fixture
def whole(tmp_path: Path) -> SampleLedger:
    """Five steps, each with two samples on one rank."""
    return ledger(tmp_path / "whole", [begin(1, 0), *(step(1, n) for n in range(1, 6))])


def test_an_undisturbed_run_lost_nothing(whole: SampleLedger) -> None:
    assert sorted(whole.counted) == [1, 2, 3, 4, 5] and not whole.missing(5)
    assert not whole.redone and not whole.differing and whole.attempts == 1
    assert not whole.beyond(whole)


def test_what_a_restart_does_again_counts_once(whole: SampleLedger, tmp_path: Path) -> None:
    first = [begin(1, 0), *(step(1, n) for n in range(1, 5))]
    again = [begin(2, 2), *(step(2, n) for n in range(3, 6))]
    found = ledger(tmp_path / "run", first + again)
    assert found.redone == [3, 4] and not found.differing and found.attempts == 2
    assert not found.beyond(whole) and not whole.beyond(found)


def test_lost_and_repeated_samples_are_found(whole: SampleLedger, tmp_path: Path) -> None:
    # It went on two steps late: step 3 never counted. In step 5 a sample came twice.
    lines = [begin(1, 0), step(1, 1), step(1, 2), begin(2, 3), step(2, 4), step(2, 5, 50, 50)]
    found = ledger(tmp_path / "run", lines)
    assert found.missing(5) == [3]
    assert whole.beyond(found) == {("train/30", 30): 1, ("train/31", 31): 1, ("train/51", 51): 1}
    assert found.beyond(whole) == {("train/50", 50): 1}


def test_a_sample_in_another_step_is_lost_there_and_repeated_here(
    whole: SampleLedger, tmp_path: Path
) -> None:
    lines = [begin(1, 0), step(1, 1, 10, 20), step(1, 2, 11, 21), *(step(1, n) for n in (3, 4, 5))]
    found = ledger(tmp_path / "run", lines)
    assert whole.beyond(found) == found.beyond(whole) != {}
    assert whole.beyond(found).keys() == {("train/11", 11), ("train/20", 20)}


@pytest.mark.parametrize("change", [{"loss": "b"}, {"seeds": (30, 32)}])
def test_a_step_that_was_not_the_same_again_is_found(
    tmp_path: Path, change: dict[str, object]
) -> None:
    seeds, loss = change.get("seeds", (30, 31)), change.get("loss", "a")
    lines = [begin(1, 0), *(step(1, n) for n in (1, 2, 3))]
    lines += [begin(2, 2), step(2, 3, *seeds, loss=loss)]  # type: ignore[misc, arg-type]
    found = ledger(tmp_path / "run", lines)
    assert found.redone == found.differing == [3]


def test_a_kill_between_two_ranks_and_in_a_line(tmp_path: Path) -> None:
    ranks = [[begin(1, 0), step(1, 1, 10), step(1, 2, 20)], [begin(1, 0), step(1, 1, 11)]]
    ledger(tmp_path / "run", *ranks)
    with (tmp_path / "run" / "samples_rank1.jsonl").open("a") as file:
        file.write('{"attempt": 1, "step": 2, "sam')
        file.write("\n" + json.dumps(begin(2, 1)) + "\n")
        file.write(json.dumps(step(2, 2, 21)) + "\n")
    with (tmp_path / "run" / "samples_rank0.jsonl").open("a") as file:
        file.write(json.dumps(begin(2, 1)) + "\n" + json.dumps(step(2, 2, 20)) + "\n")
    found = read_samples(tmp_path / "run")
    assert found.redone == [2] and not found.differing
    assert found.counted[2].samples == {("train/20", 20): 1, ("train/21", 21): 1}


@pytest.mark.parametrize(("seeds", "differing"), [((20, 21), []), ((20, 22), [2]), ((20,), [2])])
def test_a_step_that_other_ranks_do_again(
    tmp_path: Path, seeds: tuple[int, ...], differing: list[int]
) -> None:
    """Two ranks, then one, which has all samples and another loss."""
    after = [begin(2, 1, world_size=1), step(2, 2, *seeds, loss="b")]
    first = [begin(1, 0), step(1, 1, 10), step(1, 2, 20)]
    second = [begin(1, 0), step(1, 1, 11), step(1, 2, 21)]
    found = ledger(tmp_path / "run", [*first, *after], second)
    assert found.redone == [2] and found.differing == differing
    # The second rank of the first attempt was killed before its line.
    cut = ledger(tmp_path / "cut", [*first, *after], second[:2])
    assert cut.redone == [2] and not cut.differing


def test_a_run_that_is_stopped_and_damaged_counts_the_plan_once(module_path: Path) -> None:
    """Against the plan itself, with a checkpoint lost in between."""
    prepare_here(module_path)
    recipe = tiny_recipe(module_path, "ledger", logging={"samples": True, "tensorboard": False})
    cpu = torch.device("cpu")
    with pytest.raises(StopRequested):
        train(recipe, cpu, lambda step, loss: step == 5)
    (recipe.run_dir / "checkpoints" / "step_00000005" / "manifest.json").unlink()
    train(recipe, cpu, lambda step, loss: False)
    found = read_samples(recipe.run_dir)
    assert found.redone == [4, 5] and not found.differing and not found.missing(8)
    indexes = {s.name: load_index(shards_url(recipe.data, s)) for s in recipe.data.sources}
    vocabulary = indexes["lvis_train"].vocabulary
    stream = Stream(recipe.data, recipe.training, indexes, vocabulary, seed=recipe.seed)
    for number, record in found.counted.items():
        planned = [slot.seed for slot in stream.plan.step(number - 1, 0, 1)]
        assert sorted(seed for _, seed in record.samples.elements()) == sorted(planned)
        assert len(record.samples) == recipe.training.batch_size
