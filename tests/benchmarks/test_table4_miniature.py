"""Table 4 in miniature: rows that compare, statistics, order of runs, and going on after a kill."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import RecipeError
from pipeline.recipe import Recipe

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import table4_figures as figures  # noqa: E402
import table4_miniature as table4  # noqa: E402


def settings(work: Path, *overrides: str) -> table4.Settings:
    return table4.Settings(work, "cpu", overrides)


def made_up(row: str, seed: int, ap: float, rare: float, steps: int = 10) -> figures.Result:
    values = {"AP": ap, "APr": rare, "APc": 0.5, "APf": 0.25}
    return {"row": row, "seed": seed, "steps": steps, "seconds": 90.0, "recipe": "x", **values}


def learnt(recipe: Recipe, *, but: set[str]) -> dict[str, object]:
    """All values of a recipe by dotted key, except those below `but`."""
    flat: dict[str, object] = {}

    def walk(tree: dict[str, object], prefix: str) -> None:
        for key, value in tree.items():
            if prefix + key in but:
                continue
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")
            else:
                flat[prefix + key] = value

    walk(recipe.model_dump(mode="json"), "")
    return flat


CHANGES = {
    "dino": {"semantic", "data.extra", "training.batch_size", "detector.class_head.kind"},
    "dino_language_head": {"semantic", "data.extra", "training.batch_size"},
    "detic": {"semantic", "detector.losses.image_level", "data.transforms.mosaic"},
    "richsem": set(),
    "richsem_without_extra": {"data.extra", "training.batch_size"},
    "richsem_inet_unl": {"data.extra"},
    "hard_labels": {"semantic.labels"},
    "coarse_as_published": {"data.extra", "detector.losses.coarse_box_cost"},
}


def test_rows_differ_in_what_they_are_about_and_in_nothing_else(tmp_path: Path) -> None:
    assert list(table4.read_rows()) == list(CHANGES)
    full = settings(tmp_path).recipe("richsem", 1)
    for name, change in CHANGES.items():
        recipe = settings(tmp_path).recipe(name, 1)
        assert learnt(recipe, but={"name", *change}) == learnt(full, but={"name", *change}), name
        assert recipe.initialize_from == "pretrained_s1" and recipe.seed == 1
        per_step = recipe.training.batch_size
        lvis = per_step / (1 + recipe.data.extra_ratio) if recipe.data.extra else per_step
        assert lvis == 8, f"{name} sees another number of LVIS images"
    unlabelled = settings(tmp_path).recipe("richsem_inet_unl", 0).data.extra[0]
    assert not unlabelled.has_labels and unlabelled.images == full.data.extra[0].images


def test_the_pre_training_fits_and_knows_nothing_of_the_tail(tmp_path: Path) -> None:
    before = settings(tmp_path).recipe("pretrained", 2)
    after = settings(tmp_path).recipe("richsem", 2)
    assert before.name == after.initialize_from and before.seed == after.seed
    assert before.teacher == after.teacher
    free = {
        "losses": {"federated_categories", "coarse_box_cost", "weight_image_level"},
        "backbone": {"frozen_stages"},
    }
    assert before.detector.model_dump(exclude=free) == after.detector.model_dump(exclude=free)
    assert [source.format for source in before.data.sources] == ["objects365"]


def test_statistics_are_those_of_paired_samples() -> None:
    rng = np.random.default_rng(0)
    ap = {row: rng.random(4) for row in ("dino", "richsem")}
    results = [made_up(row, s, float(ap[row][s]), 0.1) for row in ap for s in range(4)]
    results = [r for r in results if (r["row"], r["seed"]) != ("dino", 3)]
    mean, error, pairs = figures.paired(results, "richsem", "AP")
    difference = 100 * (ap["richsem"] - ap["dino"])[:3]
    assert pairs == 3
    assert mean == pytest.approx(difference.mean())
    assert error == pytest.approx(difference.std(ddof=1) / np.sqrt(3))
    text = figures.markdown(results, {"dino": "DINO", "richsem": "RichSem"})
    own = 100 * ap["richsem"]
    assert f"| RichSem | 4 | {own.mean():.2f} ± {own.std(ddof=1):.2f} | 10.00 ± 0.00 |" in text
    assert f"| RichSem | 3 | {mean:+.2f} ± {error:.2f} |" in text


def test_the_method_is_compared_to_every_other_row_seed_by_seed() -> None:
    rival = [made_up("detic", seed, 0.01 * seed, 0.1) for seed in range(3)]
    own = [made_up("richsem", seed, 0.01 * seed + 0.02, 0.1) for seed in range(2)]
    titles = {"detic": "Detic", "richsem": "RichSem"}
    text = figures.markdown([*rival, *own], {"dino": "DINO", **titles})
    after = text.split("RichSem, minus each other row")[1]
    assert "| Detic | 2 | +2.00 ± 0.00 | +0.00 ± 0.00 |" in after
    assert "minus each" not in figures.markdown(rival, {"dino": "DINO", **titles})


def test_one_seed_has_no_deviation_and_a_missing_baseline_no_difference() -> None:
    alone = figures.markdown([made_up("richsem", 0, 0.3, 0.2)], {"dino": "D", "richsem": "R"})
    assert "| R | 1 | 30.00 | 20.00 | 50.00 | 25.00 | 1.5 |" in alone
    assert "| R | 0 | - | - | - | - |" in alone


def test_a_figure_that_no_category_gives_is_a_dash() -> None:
    results = [made_up(row, 0, 0.1, 0.1) | {"APr": None} for row in ("dino", "richsem")]
    titles = {"dino": "D", "richsem": "R"}
    text = figures.markdown(results, titles)
    assert "| R | 1 | 10.00 | - | 50.00 | 25.00 | 1.5 |" in text
    assert "| R | 1 | +0.00 | - | +0.00 | +0.00 |" in text
    ElementTree.fromstring(figures.plot(results, titles))


def test_rows_of_unequal_steps_are_refused() -> None:
    results = [made_up("dino", 0, 0.1, 0.1, steps=10), made_up("richsem", 0, 0.1, 0.1, steps=20)]
    with pytest.raises(AssertionError, match="do not compare"):
        figures.markdown(results, {"dino": "D", "richsem": "R"})


def test_the_plot_has_a_dot_for_each_run_at_its_place() -> None:
    results = [made_up("dino", s, 0.1 + 0.01 * s, 0.02) for s in range(3)]
    results.append(made_up("richsem", 0, 0.2, 0.3))
    root = ElementTree.fromstring(figures.plot(results, {"dino": "D", "richsem": "R & S"}))
    name = "{http://www.w3.org/2000/svg}"
    dots = [
        (float(c.get("cx", "")), c.findtext(f"{name}title")) for c in root.iter(f"{name}circle")
    ]
    assert len(dots) == 2 * 4
    (a, _), (b, _), (c, text) = dots[:3]
    assert a < b < c and text == "12.00" and b - a == pytest.approx(c - b, abs=0.2)


CHILD = """
import sys, time
from pathlib import Path
name, seed = sys.argv[-2:]
log = Path(sys.argv[1])
with log.open("a") as stream: stream.write(f"begin {name} {seed}\\n")
time.sleep(0.3)
if name == "bad": sys.exit("cannot go on")
with log.open("a") as stream: stream.write(f"end {name} {seed}\\n")
"""


def runs(folder: Path, jobs: int, finished: list[tuple[str, int]]) -> table4.Runs:
    (folder / "child.py").write_text(CHILD)
    command = [sys.executable, str(folder / "child.py"), str(folder / "log")]
    return table4.Runs(command, folder, jobs, lambda *task: finished.append(task))


def test_rows_wait_for_the_pre_training_of_their_seed(tmp_path: Path) -> None:
    tasks = [("pretrained", 0), ("dino", 0), ("detic", 0), ("pretrained", 1), ("dino", 1)]
    finished: list[tuple[str, int]] = []
    runs(tmp_path, 2, finished).run(tasks)
    assert sorted(finished) == sorted(tasks)
    lines = (tmp_path / "log").read_text().splitlines()
    for name, seed in (("dino", 0), ("detic", 0), ("dino", 1)):
        assert lines.index(f"end pretrained {seed}") < lines.index(f"begin {name} {seed}")
    under_way = np.cumsum([1 if line.startswith("begin") else -1 for line in lines])
    assert under_way.max() == 2


def test_a_run_that_fails_is_named_with_its_last_words(tmp_path: Path) -> None:
    finished: list[tuple[str, int]] = []
    with pytest.raises(SystemExit, match=r"bad, seed 0, ended with 1: cannot go on"):
        runs(tmp_path, 1, finished).run([("dino", 0), ("bad", 0), ("dino", 1)])
    assert finished == [("dino", 0)]


def test_a_seed_that_was_not_asked_for_is_no_part_of_the_table(tmp_path: Path) -> None:
    """One for trials may lie beside the others."""
    results = [made_up("dino", seed, ap, 0.1) for seed, ap in ((0, 0.2), (1, 0.4), (100, 0.9))]
    for seeds, cells in ((range(2), "| 2 | 30.00 ± 14.14 |"), (range(100, 101), "| 1 | 90.00 |")):
        table4.write_results(settings(tmp_path), results, seeds)
        assert f"| DINO {cells}" in (tmp_path / "table.md").read_text()
        assert len(json.loads((tmp_path / "results.json").read_text())) == 3
    (tmp_path / "table.md").unlink()
    table4.write_results(settings(tmp_path), results, range(5, 8))
    assert not (tmp_path / "table.md").exists()


def test_results_of_another_recipe_are_refused(tmp_path: Path) -> None:
    result = made_up("dino", 0, 0.1, 0.1) | {"recipe": settings(tmp_path).key("dino", 0)}
    table4.write_results(settings(tmp_path), [result], range(3))
    assert table4.read_results(settings(tmp_path)) == [result]
    with pytest.raises(RecipeError, match="by another recipe"):
        table4.read_results(settings(tmp_path, "training.steps=40"))


def test_results_from_another_pre_training_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes = tmp_path / "recipes"
    shutil.copytree(table4.HERE, recipes)
    monkeypatch.setattr(table4, "HERE", recipes)
    result = made_up("dino", 0, 0.1, 0.1) | {"recipe": settings(tmp_path).key("dino", 0)}
    table4.write_results(settings(tmp_path), [result], range(3))
    before = (recipes / "pretrained.yaml").read_text()
    (recipes / "pretrained.yaml").write_text(before.replace("warmup_steps: 20", "warmup_steps: 21"))
    with pytest.raises(RecipeError, match="by another recipe"):
        table4.read_results(settings(tmp_path))


TINY = (
    "data.miniature=tiny",
    "training.steps=6",
    "training.warmup_steps=1",
    "training.checkpoint_every=2",
    "training.log_every=1",
    "training.batch_size=4",
    "teacher.train.steps=2",
    "teacher.train.warmup_steps=0",
    "teacher.train.batch_size=16",
)


@pytest.mark.slow
def test_killed_in_the_middle_it_goes_on_and_ends_with_the_table(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "table4_miniature.py"), "--work", str(tmp_path)]
    command += ["--seeds", "1", "--jobs", "1", *TINY, "--rows", "dino", "richsem"]
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent)}
    first = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while not list((tmp_path / "runs" / "dino_s0" / "checkpoints").glob("step_*/manifest.json")):
        assert first.poll() is None, "ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    time.sleep(5)  # The orphan sees that its parent is gone, and saves.
    before = (tmp_path / "runs" / "pretrained_s0" / "metrics.jsonl").read_bytes()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "runs" / "pretrained_s0" / "metrics.jsonl").read_bytes() == before
    results = json.loads((tmp_path / "results.json").read_text())
    assert [(r["row"], r["seed"], r["steps"]) for r in results] == [
        ("dino", 0, 6),
        ("richsem", 0, 6),
    ]
    assert results[1]["samples"] == {"lvis_train": 12, "inet_lvis": 12}
    assert "| DINO | 1 |" in done.stdout and (tmp_path / "table.svg").is_file()
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "started" not in again.stdout and "| DINO | 1 |" in again.stdout
