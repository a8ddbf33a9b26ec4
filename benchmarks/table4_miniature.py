"""Table 4 of the paper in miniature: DINO, Detic on DINO, RichSem, and three variants of RichSem.

    python benchmarks/table4_miniature.py --work runs/table4            # 3 seeds, 2 runs at a time
    python benchmarks/table4_miniature.py --work runs/table4 --report   # only what is there

For each seed one box pre-training, then every row of table4_miniature/rows.yaml from it, all with
the same number of optimiser steps. A run is one process of one thread (or one GPU, `--device
cuda`). Killed at any moment, the same command goes on: finished runs stay in results.json,
unfinished ones go on from their checkpoints. Overrides (`training.steps=100`) hold for all runs.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

from table4_figures import KEYS, Result, markdown, plot

from pipeline.errors import LongtailError, RecipeError
from pipeline.recipe import Recipe
from pipeline.recipe_file import load_recipe, parse_yaml

HERE = Path(__file__).resolve().parent / "table4_miniature"
PREPARATION, PRETRAINING = "preparation", "pretrained"

Argument = TypeVar("Argument")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Row:
    """A row of the table, and what it changes in the fine-tuning."""

    name: str
    title: str
    change: tuple[str, ...]


@dataclass(frozen=True)
class Settings:
    """Where everything goes, on which device, and overrides of all recipes."""

    work: Path
    device: str
    overrides: tuple[str, ...]

    def recipe(self, name: str, seed: int) -> Recipe:
        """The recipe of a row or of the pre-training with a seed."""
        common = [
            f"data.root={self.work / 'world'}",
            f"output={self.work / 'runs'}",
            f"name={name}_s{seed}",
            f"seed={seed}",
            f"cluster.gpus_per_worker={int(self.device == 'cuda')}",
        ]
        if name == PRETRAINING:
            return load_recipe(HERE / "pretrained.yaml", [*common, *self.overrides])
        change = read_rows()[name].change
        common.append(f"initialize_from={PRETRAINING}_s{seed}")
        return load_recipe(HERE / "fine_tuned.yaml", [*common, *change, *self.overrides])

    def key(self, name: str, seed: int) -> str:
        """What a row's result follows from: its recipe and that of the weights that it starts from,
        which its own recipe only names."""
        return f"{self.recipe(PRETRAINING, seed).hash()}-{self.recipe(name, seed).hash()}"


def read_rows() -> dict[str, Row]:
    """Rows by name, in the order of the table."""
    tree = parse_yaml((HERE / "rows.yaml").read_text(encoding="utf-8"), "rows.yaml")
    assert isinstance(tree, dict)
    return {name: Row(name, row["title"], tuple(row["change"])) for name, row in tree.items()}


def prepare(settings: Settings, names: Sequence[str], jobs: int) -> None:
    """The world, the shards of all rows, and the teacher, which all runs share."""
    from pipeline.check import sources_of
    from pipeline.data.miniature.world import draw_world
    from pipeline.data.shards.preparing import load_index, prepare_source, shards_url
    from pipeline.semantics.contrastive import train_teacher
    from pipeline.semantics.teacher import teacher_dir
    from pipeline.training.build import cache_dir
    from pipeline.training.device import worker_device

    recipes = [settings.recipe(name, 0) for name in (PRETRAINING, *names)]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:

        def run(
            function: Callable[[Argument], Answer], arguments: Sequence[Argument], /
        ) -> Iterator[tuple[int, Answer]]:
            futures = {pool.submit(function, one): i for i, one in enumerate(arguments)}
            for future in as_completed(futures):
                yield futures[future], future.result()

        data = recipes[0].data
        assert data.miniature is not None
        draw_world(data.root, data.miniature, data.miniature_seed, run)
        for source in {s.name: s for recipe in recipes for s in sources_of(recipe)}.values():
            index = prepare_source(source, data, run)
            print(f"{source.name}: {index.num_samples:,} images", flush=True)
    recipe = recipes[0]
    assert recipe.teacher.train is not None
    train_teacher(
        recipe.teacher,
        load_index(shards_url(recipe.data, recipe.teacher.train.captions)),
        teacher_dir(recipe.teacher, recipe.data, cache_dir(recipe)),
        lambda step, steps, loss: print(f"teacher: {step} of {steps}, loss {loss:.3f}", flush=True),
        progress_every=100,
        device=worker_device(recipe),
    )


def run_one(settings: Settings, name: str, seed: int) -> None:
    """Train a run from wherever it is to its end, and evaluate it."""
    import torch

    from pipeline.evaluation.checkpoints import evaluate_newest, is_evaluated
    from pipeline.training.device import worker_device
    from pipeline.training.loop import train_here

    recipe = settings.recipe(name, seed)
    torch.set_num_threads(1)
    train_here(recipe)
    if recipe.data.validation is not None and not is_evaluated(recipe):
        print(evaluate_newest(recipe, worker_device(recipe)), flush=True)


def stop_with_parent() -> None:
    """Ask this process to stop, which saves a checkpoint, as soon as its parent is gone."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


@dataclass
class Runs:
    """Runs as child processes, some at a time; a row waits for the pre-training of its seed."""

    command: list[str]
    work: Path
    jobs: int
    finished: Callable[[str, int], None]

    def run(self, tasks: Sequence[tuple[str, int]]) -> None:
        """Run all, in order as far as possible; raises `SystemExit` where one fails."""
        waiting, pending = list(tasks), set(tasks)
        running: dict[tuple[str, int], subprocess.Popen[bytes]] = {}
        try:
            while waiting or running:
                for task in list(waiting):
                    if len(running) < self.jobs and (PRETRAINING, task[1]) not in pending - {task}:
                        waiting.remove(task)
                        running[task] = self._start(*task)
                time.sleep(0.5)
                for task, process in list(running.items()):
                    if process.poll() is None:
                        continue
                    del running[task]
                    if process.returncode:
                        raise SystemExit(
                            f"{task[0]}, seed {task[1]}, ended with {process.returncode}: "
                            f"{self._log(*task).read_text(errors='replace')[-2000:]}"
                        )
                    pending.remove(task)
                    self.finished(*task)
        finally:
            for process in running.values():
                process.terminate()
            for process in running.values():
                process.wait()

    def _start(self, name: str, seed: int) -> subprocess.Popen[bytes]:
        print(f"{time.strftime('%H:%M:%S')} {name}, seed {seed}: started", flush=True)
        log = self._log(name, seed)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as stream:
            # A session of its own: a Ctrl-C reaches this process alone, which asks once.
            return subprocess.Popen(
                [*self.command, "--one", name, str(seed)],
                stdout=stream,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )

    def _log(self, name: str, seed: int) -> Path:
        return self.work / "logs" / f"{name}_s{seed}.log"


def read_result(settings: Settings, name: str, seed: int) -> Result:
    """What a finished run came to; `seconds` are those of its steps and of its evaluation."""
    recipe = settings.recipe(name, seed)
    found = json.loads((recipe.run_dir / "results.json").read_text(encoding="utf-8"))
    seconds, before = 0.0, 0
    for text in (recipe.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        if "loss" in line:
            seconds += line["seconds"] * (line["step"] - before)
            before = line["step"]
    return {
        "row": name,
        "seed": seed,
        "recipe": settings.key(name, seed),
        "steps": found["step"],
        "samples": found["consumed"]["samples"],
        "seconds": round(seconds + found["seconds"], 1),
        **{key: found[key] for key in KEYS},
    }


def read_results(settings: Settings) -> list[Result]:
    """What is in the work folder; raises `RecipeError` where another recipe made it."""
    path = settings.work / "results.json"
    if not path.is_file():
        return []
    results: list[Result] = json.loads(path.read_text(encoding="utf-8"))
    for result in results:
        name, seed = str(result["row"]), int(str(result["seed"]))
        if name not in read_rows() or settings.key(name, seed) != result["recipe"]:
            raise RecipeError(
                f"{path} has a result of {name}, seed {seed}, by another recipe than this one; "
                "give another --work, or the overrides and the device that it was made with"
            )
    return results


def write_results(settings: Settings, results: Sequence[Result], seeds: range) -> None:
    """results.json, table.md and table.svg, each whole or not at all.

    The tables are of the seeds that were asked for: others that lie beside them, such as one that
    chose a recipe, are no part of their means.
    """
    texts = {"results.json": json.dumps(results, indent=1) + "\n"}
    titles = {row.name: row.title for row in read_rows().values()}
    asked = [result for result in results if result["seed"] in seeds]
    if asked:
        texts |= {"table.md": markdown(asked, titles), "table.svg": plot(asked, titles)}
    for name, text in texts.items():
        temporary = settings.work / f".{name}"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(settings.work / name)


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of everything")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds of each row (3)")
    parser.add_argument("--first-seed", type=int, default=0, help="the first of them (0)")
    parser.add_argument("--rows", nargs="+", choices=read_rows(), default=list(read_rows()))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (2)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--report", action="store_true", help="print the table, run nothing")
    parser.add_argument("--one", nargs=2, metavar=("RUN", "SEED"), help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="section.key=value for all recipes")
    arguments = parser.parse_intermixed_args()
    work = arguments.work.resolve()
    settings = Settings(work, arguments.device, tuple(arguments.overrides))
    if arguments.one:
        stop_with_parent()
        name, seed = arguments.one[0], int(arguments.one[1])
        if name == PREPARATION:
            prepare(settings, arguments.rows, arguments.jobs)
        else:
            run_one(settings, name, seed)
        return
    work.mkdir(parents=True, exist_ok=True)
    results = read_results(settings)
    if not arguments.report:
        fill(settings, results, arguments)
    write_results(settings, results, seeds_of(arguments))
    if any(result["seed"] in seeds_of(arguments) for result in results):
        print((work / "table.md").read_text(encoding="utf-8"))
    else:
        print(f"nothing of these seeds is in {work}")


def seeds_of(arguments: argparse.Namespace) -> range:
    """Those that are asked for."""
    return range(arguments.first_seed, arguments.first_seed + arguments.seeds)


def fill(settings: Settings, results: list[Result], arguments: argparse.Namespace) -> None:
    """Run what `results` lack, and add it to them as it comes."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    there = {(result["row"], result["seed"]) for result in results}
    tasks: list[tuple[str, int]] = []
    for seed in seeds_of(arguments):
        missing = [(name, seed) for name in arguments.rows if (name, seed) not in there]
        tasks += [(PRETRAINING, seed), *missing] if missing else []

    def finished(name: str, seed: int) -> None:
        print(f"{time.strftime('%H:%M:%S')} {name}, seed {seed}: done", flush=True)
        if name in arguments.rows:
            results.append(read_result(settings, name, seed))
            write_results(settings, results, seeds_of(arguments))

    options = ["--work", str(settings.work), "--device", settings.device]
    options += ["--jobs", str(arguments.jobs), *settings.overrides, "--rows", *arguments.rows]
    runs = Runs([sys.executable, __file__, *options], settings.work, arguments.jobs, finished)
    if tasks:
        runs.run([(PREPARATION, 0)])
        runs.run(tasks)


if __name__ == "__main__":
    try:
        main()
    except LongtailError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
