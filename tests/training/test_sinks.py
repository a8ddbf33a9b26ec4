"""What reaches TensorBoard, Weights & Biases and trackio, read back from what they stored."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_world import ENVIRONMENT, tiny_recipe

from pipeline.errors import RecipeError
from pipeline.recipe import Recipe
from pipeline.training.log import RunLog
from pipeline.training.loop import join_process_group
from pipeline.training.metrics import SinkFeed, append_event
from pipeline.training.sinks import TensorBoardSink, open_sinks


def write_a_run(recipe: Recipe) -> None:
    """Steps 1 and 2, an evaluation by another process that comes late, then step 3."""
    join_process_group(torch.device("cpu"))
    with RunLog(recipe, 0) as log:
        log.write("step", 1, {"loss": 4.0, "stream": "train", "samples": {"lvis": 4}})
        log.write("step", 2, {"loss": 3.0, "loss/class": 1.0})
        append_event(recipe.run_dir, "evaluation", 1, {"AP": 0.25, "APr": None, "subset": "2 of 9"})
        log.write("step", 3, {"loss": 2.0})
        append_event(recipe.run_dir, "evaluation", 3, {"AP": 0.5})


def board(recipe: Recipe) -> EventAccumulator:
    events = EventAccumulator(str(recipe.run_dir / "tensorboard"))
    events.Reload()
    return events


def test_tensorboard_gets_steps_and_the_evaluations_of_others(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, "run")
    write_a_run(recipe)
    events = board(recipe)
    scalars = {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }
    assert scalars == {
        "loss": [(1, 4.0), (2, 3.0), (3, 2.0)],
        "loss/class": [(2, 1.0)],
        "evaluation_subset/AP": [(1, 0.25)],
        "evaluation/AP": [(3, 0.5)],
    }


def test_a_resumed_run_says_nothing_twice(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, "run")
    write_a_run(recipe)
    with RunLog(recipe, 2) as log:
        log.write("step", 3, {"loss": 1.5})
    lines = [json.loads(line) for line in (recipe.run_dir / "metrics.jsonl").open()]
    assert [(line["event"], line["step"]) for line in lines] == [
        ("step", 1), ("step", 2), ("evaluation", 1), ("step", 3),
    ]  # fmt: skip
    assert [(e.step, e.value) for e in board(recipe).Scalars("loss")] == [(1, 4), (2, 3), (3, 1.5)]
    assert [e.step for e in board(recipe).Scalars("evaluation_subset/AP")] == [1]


def test_lines_that_come_after_the_trainer_are_passed_on_once(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, "run")
    write_a_run(recipe)
    append_event(recipe.run_dir, "evaluation", 2, {"AP": 0.75, "subset": "2 of 9"})
    for _ in range(2):
        SinkFeed(recipe).close()
    points = [(e.step, e.value) for e in board(recipe).Scalars("evaluation_subset/AP")]
    assert points == [(1, 0.25), (2, 0.75)]
    assert len(board(recipe).Scalars("loss")) == 3


def test_half_a_line_waits_for_its_end(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, "run")
    write_a_run(recipe)
    with (recipe.run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"event": "step", "step": 4, "lo')
        file.flush()
        SinkFeed(recipe).close()
        file.write('ss": 1.25}\n')
    SinkFeed(recipe).close()
    assert [e.value for e in board(recipe).Scalars("loss")] == [4.0, 3.0, 2.0, 1.25]


def test_a_sink_that_fails_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise ConnectionError("no way to the server")

    monkeypatch.setattr(TensorBoardSink, "write", refuse)
    write_a_run(tiny_recipe(tmp_path, "run"))
    warnings = [r.getMessage() for r in caplog.records if r.name.startswith("pipeline")]
    assert warnings == ["TensorBoardSink failed and gets no more figures: no way to the server"]


@pytest.mark.parametrize("damage", ["", "7", "-3", "99999999", "x"])
def test_a_damaged_offset_ends_nothing(tmp_path: Path, damage: str) -> None:
    recipe = tiny_recipe(tmp_path, "run")
    write_a_run(recipe)
    (recipe.run_dir / ".passed_on").write_text(damage)
    with RunLog(recipe, 3) as log:
        log.write("step", 4, {"loss": 1.5})
    assert [e.value for e in board(recipe).Scalars("loss")][-1] == 1.5


def test_a_sink_that_cannot_be_opened_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise ConnectionError("no key")

    monkeypatch.setattr(TensorBoardSink, "__init__", refuse)
    recipe = tiny_recipe(tmp_path, "run")
    write_a_run(recipe)
    assert "cannot be opened: no key" in caplog.text
    assert len((recipe.run_dir / "metrics.jsonl").read_text().splitlines()) == 5


def test_sinks_are_chosen_by_the_recipe(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, "run", logging={"tensorboard": False})
    write_a_run(recipe)
    assert not (recipe.run_dir / "tensorboard").exists()
    assert len((recipe.run_dir / "metrics.jsonl").read_text().splitlines()) == 5


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_a_package_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    recipe = tiny_recipe(tmp_path, "run", logging={package: "tail"})
    with pytest.raises(RecipeError, match=f"logging.{package} is set.*pip install {package}"):
        open_sinks(recipe)


WRITE = """
import sys
sys.path[:0] = ["tests", "tests/training"]
from pathlib import Path
from tiny_world import tiny_recipe
from test_sinks import write_a_run
write_a_run(tiny_recipe(Path(sys.argv[1]), "run", logging={sys.argv[2]: "tail"}))
"""


def write_in_a_process(folder: Path, package: str, **environment: str) -> None:
    """These packages leave threads and global state behind."""
    subprocess.run(
        [sys.executable, "-c", WRITE, str(folder), package],
        check=True,
        env=ENVIRONMENT | environment,
        cwd=Path(__file__).parents[2],
        timeout=120,
    )


def log_records(log: bytes, block: int = 32768, header: int = 7) -> list[bytes]:
    """Records of a LevelDB log after W&B's own seven bytes: checksum, length, type, data; types 1
    to 4 are a whole record, its first, middle and last part; blocks end in zeros."""
    records, place = [], 0
    while place + header <= len(log):
        if block - (place + 7) % block < header:
            place += block - (place + 7) % block
            continue
        length, kind = struct.unpack_from("<HB", log, place + 4)
        data = log[place + header : place + header + length]
        records = [*records, data] if kind in (1, 2) else [*records[:-1], records[-1] + data]
        place += header + length
    return records


@pytest.mark.slow
def test_wandb_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    from wandb.proto import wandb_internal_pb2

    write_in_a_process(tmp_path, "wandb", WANDB_MODE="offline", WANDB_SILENT="true")
    [file] = (tmp_path / "runs" / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    rows = []
    for data in log_records(file.read_bytes()[7:]):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
    seen = [{k: v for k, v in row.items() if not k.startswith("_")} for row in rows]
    assert seen == [
        {"step": 1, "loss": 4.0},
        {"step": 2, "loss": 3.0, "loss/class": 1.0},
        {"step": 1, "evaluation_subset/AP": 0.25},
        {"step": 3, "loss": 2.0},
        {"step": 3, "evaluation/AP": 0.5},
    ]


@pytest.mark.slow
def test_trackio_on_this_machine(tmp_path: Path) -> None:
    pytest.importorskip("trackio", reason="trackio is not installed")
    import sqlite3

    write_in_a_process(tmp_path, "trackio", TRACKIO_DIR=str(tmp_path / "store"))
    [file] = (tmp_path / "store").glob("tail*.db")
    with sqlite3.connect(file) as connection:
        rows = connection.execute("select step, metrics from metrics order by id").fetchall()
    assert [(step, json.loads(text)) for step, text in rows] == [
        (1, {"loss": 4.0}),
        (2, {"loss": 3.0, "loss/class": 1.0}),
        (1, {"evaluation_subset/AP": 0.25}),
        (3, {"loss": 2.0}),
        (3, {"evaluation/AP": 0.5}),
    ]
