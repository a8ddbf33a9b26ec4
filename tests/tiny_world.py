"""Training on the tiny miniature world: a recipe of seconds, its data, and runs to compare."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from pipeline.data.miniature.world import draw_world
from pipeline.data.shards.preparing import load_index, prepare_source, shards_url
from pipeline.recipe import Recipe
from pipeline.semantics.contrastive import train_teacher
from pipeline.semantics.teacher import teacher_dir
from pipeline.training.build import cache_dir
from pipeline.training.loop import join_process_group
from pipeline.training.manifest import checkpoint_dir
from pipeline.training.window import WAITS

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def tiny_recipe(folder: Path, name: str, **changes: dict[str, object] | object) -> Recipe:
    """A stage with the semantic branch and extra data; `changes` are merged into sections."""
    sources = {
        "lvis_train": ("lvis", "lvis", "annotations/lvis_v1_train.json"),
        "imagenet": ("imagenet21k", "imagenet21k", "imagenet21k/wnid_to_lvis.tsv"),
        "cc3m": ("cc3m", "cc3m/images", "cc3m/Train_GCC-training.tsv"),
    }
    lvis, imagenet, captions = (
        {"name": key, "format": kind, "images": images, "annotations": annotations}
        for key, (kind, images, annotations) in sources.items()
    )
    tree: dict[str, object] = {
        "name": name,
        "output": str(folder / "runs"),
        "data": {
            "root": str(folder / "raw"),
            "train": [lvis],
            "extra": [imagenet],
            "workers": 0,
            "samples_per_shard": 20,
            "transforms": {
                "short_sides": [64, 72],
                "max_side": 96,
                "crop_short_sides": [64],
                "crop_sizes": [40, 64],
                "mosaic_cell": 48,
            },
        },
        "teacher": {
            "model": "miniature-rn",
            "pretrained": None,
            "prompts": "single",
            "train": {"captions": captions, "steps": 2, "batch_size": 16, "warmup_steps": 0},
        },
        "detector": {
            "backbone": {
                "name": "resnet18",
                "weights": None,
                "norm": "group",
                "frozen_stages": 0,
            },
            "hidden_dim": 32,
            "num_heads": 4,
            "num_points": 2,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "ffn_dim": 32,
            "num_queries": 12,
            "denoising": {"num_queries": 8},
            "losses": {"federated_categories": 8},
        },
        "training": {
            "steps": 8,
            "batch_size": 4,
            "micro_batch": 2,
            "learning_rate": 1e-3,
            "log_every": 1,
            "checkpoint_every": 3,
            "ema_decay": 0.9,
        },
        "cluster": {"workers": 2, "gpus_per_worker": 0},
    }
    for key, value in changes.items():
        section = tree.get(key)
        tree[key] = section | value if isinstance(section, dict) and value is not None else value
    return Recipe.model_validate(tree)


def prepare(folder: Path) -> None:
    """Raw data, shards and teacher under `folder`, for every recipe of `tiny_recipe`."""
    recipe = tiny_recipe(folder, "any")
    draw_world(recipe.data.root, "tiny", 0)
    assert recipe.teacher.train is not None
    captions = recipe.teacher.train.captions
    for source in (*recipe.data.sources, captions):
        prepare_source(source, recipe.data, in_line)
    directory = teacher_dir(recipe.teacher, recipe.data, cache_dir(recipe))
    train_teacher(recipe.teacher, load_index(shards_url(recipe.data, captions)), directory)


def prepare_here(folder: Path) -> None:
    """The same, for runs in this process: on one thread, in a process group of its own."""
    torch.set_num_threads(1)
    join_process_group(torch.device("cpu"))
    prepare(folder)


def in_line(function, arguments: Sequence) -> Iterator[tuple[int, object]]:  # type: ignore[no-untyped-def, type-arg]
    for position, argument in enumerate(arguments):
        yield position, function(argument)


def write_recipe(folder: Path, recipe: Recipe) -> Path:
    """The recipe as a file, for a command line."""
    path = folder / f"{recipe.name}.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")), encoding="utf-8")
    return path


def run_command(
    *words: str, cwd: Path = ROOT, seconds: float | None = None
) -> subprocess.CompletedProcess[str]:
    """A Python command to its end, with what it said."""
    return subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


def start_command(*words: str, log: Path) -> subprocess.Popen[bytes]:
    """A Python command with its output in a file, in a process group of its own."""
    with log.open("ab") as stream:
        return subprocess.Popen(
            [sys.executable, *words],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=ENVIRONMENT,
            cwd=ROOT,
            start_new_session=True,
        )


def metrics(recipe: Recipe) -> list[dict[str, object]]:
    """The step lines of a run, without what depends on the clock."""
    path = recipe.run_dir / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    clock = {"seconds", "images_per_second", "memory_gb", *WAITS}
    whole = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{k: v for k, v in line.items() if k not in clock} for line in whole]


def wait_for_step(
    recipe: Recipe, step: int, process: subprocess.Popen[bytes], patience_s: float
) -> None:
    """Return when the run has logged `step`."""
    deadline = time.monotonic() + patience_s
    while not any(line["step"] == step for line in metrics(recipe)):
        assert process.poll() is None, f"ended with {process.returncode} before step {step}"
        assert time.monotonic() < deadline, f"no step {step} within {patience_s} s"
        time.sleep(0.05)


def assert_same_end(first: Recipe, second: Recipe) -> None:
    """Bitwise equal weights, moments and (where kept) averages, and equal losses of every step."""
    names = ["weights", "optimizer", *(["averaged"] if first.training.ema_decay else [])]
    for name in names:
        ours, theirs = (
            load_file(checkpoint_dir(r.run_dir, r.training.steps) / f"{name}.safetensors")
            for r in (first, second)
        )
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert torch.equal(ours[key], theirs[key]), f"{name}: {key}"
    assert metrics(first) == metrics(second)


def copy_run(first: Recipe, second: Recipe) -> None:
    """The whole run directory of one recipe as another's."""
    shutil.copytree(first.run_dir, second.run_dir)
