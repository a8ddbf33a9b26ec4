"""Peak memory of each rank and step time: PyTorch's DDP and each stage of ZeRO, side by side.

    python benchmarks/zero.py [--model NAME] [--side PIXELS] [--way NAME ...] [--json FILE]

The same detector trains on the same images in fresh processes, two ranks on the CPU (gloo), one
thread each: with torch's DistributedDataParallel and AdamW, then with longtail's engine at each
stage of ZeRO. Memory is the resident set above that from before the model; `in steps` is its peak
while steps are made, `at start` while everything is set up. `predicted` is what `longtail check`
says of a step (`pipeline/check/ranks.py`), device and host together, for here they are one; nothing
of it is fitted to what is measured. Images are small, so that what ZeRO divides is most of it.

The C library keeps freed blocks below a threshold for itself, which grows by itself with what is
freed. It is held at 64 kB (MALLOC_MMAP_THRESHOLD_), so that what is freed is given back and counts
no more.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from predicted_memory import NUM_BOXES, held
from torch.nn.parallel import DistributedDataParallel

from pipeline.check.activations import MicroBatch, meta_student, step_bytes, targets_of
from pipeline.check.ranks import LAYOUTS, Layout, ModelSize, Training, rank_memory
from pipeline.detectors import build_detector
from pipeline.detectors.interface import LossContext
from pipeline.recipe import Recipe
from pipeline.training.engine import Engine, init_process_group, parameter_groups
from pipeline.training.student import Student

PEER = "DDP"
RANKS = 2
MICRO_STEPS = 2
NUM_CATEGORIES = 365
MODELS = {"r50": "resnet50", "convnext-s": "convnext_small", "tiny": "resnet10t"}
WAYS = {f"ZeRO {each}": each for each in (*LAYOUTS, Layout(2, "optimizer"))}
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "OMP_NUM_THREADS": "1",
}
PATIENCE = timedelta(minutes=10)


def recipe_of(model: str, way: str) -> Recipe:
    """As much of a recipe as a student and an engine follow from."""
    objects365 = {"name": "objects365", "format": "coco", "images": "i", "annotations": "a.json"}
    tiny = model == "tiny"
    backbone = {
        "name": MODELS[model],
        "weights": None,
        "norm": "frozen" if model == "convnext-s" else "group",
        "out_indices": [1, 2, 3] if model == "convnext-s" else [2, 3, 4],
        "frozen_stages": 0,
        "arguments": {"channels": [16, 24, 32, 48], "stem_width": 8} if tiny else {},
    }
    small = {"hidden_dim": 32, "num_heads": 4, "encoder_layers": 1, "decoder_layers": 1}
    small |= {"ffn_dim": 32, "num_queries": 20, "denoising": {"num_queries": 20}}
    layout = WAYS.get(way, Layout(0))
    return Recipe.model_validate(
        {
            "name": "zero",
            "initialize_from": "published",  # Frozen norms need trained weights, or a run before.
            "semantic": None,
            "data": {"root": ".", "train": [objects365]},
            "detector": {
                "backbone": backbone,
                "class_head": {"kind": "linear"},
                "losses": {"federated_categories": 0},
                **(small if tiny else {}),
            },
            "training": {
                "steps": 1000,
                "batch_size": RANKS * MICRO_STEPS,
                "micro_batch": 1,
                "zero_stage": layout.zero_stage,
                "offload": layout.offload,
            },
        }
    )


def micro_batch(side: int) -> MicroBatch:
    """One square image."""
    return MicroBatch(1, side, side, NUM_BOXES, NUM_CATEGORIES)


def predict(model: str, side: int) -> dict[str, Any]:
    """Bytes of a rank in each way, of its activations, and elements of the model."""
    student = meta_student(recipe_of(model, PEER), NUM_CATEGORIES)
    size = ModelSize.of(student)
    activations = step_bytes(student, micro_batch(side), on_gpu=False).peak
    training = Training(RANKS, MICRO_STEPS, averaged=False, on_gpu=False, activations=activations)
    found = {way: rank_memory(layout, size, training) for way, layout in WAYS.items()}
    totals = {way: memory.total + memory.host for way, memory in found.items()}
    return {"totals": totals, "activations": activations, "parameters": size.parameters}


def measure(options: argparse.Namespace) -> dict[str, float]:
    """One rank in one way: bytes above those from before the model, and seconds of a step."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{options.store}",
        rank=options.rank,
        world_size=RANKS,
        timeout=PATIENCE,
    )
    init_process_group(torch.device("cpu"))
    torch.manual_seed(0)
    recipe, batch = recipe_of(options.model, options.one), micro_batch(options.side)
    images = torch.randint(256, (1, 3, options.side, options.side), dtype=torch.uint8)
    inputs = (
        images,
        torch.zeros(1, options.side, options.side, dtype=torch.bool),
        targets_of(batch),
        LossContext(float(RANKS * MICRO_STEPS * NUM_BOXES), None),
    )
    before = held("VmRSS")
    step = (_peer if options.one == PEER else _engine)(recipe, inputs)
    start = held("VmHWM") - before
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Forgets the peak so far.
    seconds = []
    for number in range(options.steps):
        dist.barrier()
        begun = time.perf_counter()
        step(number)
        seconds.append(time.perf_counter() - begun)
    found = {"start": start, "steps": held("VmHWM") - before, "seconds": median(seconds[1:])}
    dist.barrier()
    return found


def _student(recipe: Recipe) -> Student:
    detector = build_detector(
        recipe.detector, num_categories=NUM_CATEGORIES, text_embeddings=None, pretrained=False
    )
    return Student(detector).train()


def _peer(recipe: Recipe, inputs: tuple[Any, ...]) -> Callable[[int], None]:
    """A step of PyTorch's own data parallelism."""
    student = _student(recipe)
    optimizer = torch.optim.AdamW(parameter_groups(student, recipe.training))
    parallel = DistributedDataParallel(student)

    def step(_: int) -> None:
        for number in range(MICRO_STEPS):
            # Gradients are reduced with the last micro-batch, as the engine's stages 0 and 1 do.
            parallel.require_backward_grad_sync = number == MICRO_STEPS - 1
            torch.stack(list(parallel(*inputs).values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), recipe.training.clip_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _engine(recipe: Recipe, inputs: tuple[Any, ...]) -> Callable[[int], None]:
    """A step of longtail's engine."""
    engine = Engine(_student(recipe), recipe.training, MICRO_STEPS)

    def step(number: int) -> None:
        for _ in range(MICRO_STEPS):
            engine.backward(engine.forward(*inputs))
        engine.step(number)

    return step


def in_own_processes(way: str, options: argparse.Namespace) -> dict[str, float]:
    """Of both ranks the larger memory and the longer time."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--one", way, "--store", f"{folder}/store"]
        command += ["--model", options.model, "--side", str(options.side)]
        command += ["--steps", str(options.steps)]
        environment = {**os.environ, **ENVIRONMENT, "WORLD_SIZE": str(RANKS)}
        ranks = [
            subprocess.Popen(
                [*command, "--rank", str(rank)],
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(RANKS)
        ]
        outputs = [process.communicate()[0] for process in ranks]
    if any(process.returncode for process in ranks):
        raise SystemExit(f"{way} failed; its error stands above")
    found = [json.loads(output.splitlines()[-1]) for output in outputs]
    return {key: max(each[key] for each in found) for key in found[0]}


def main() -> None:
    """Print a line for each way."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="convnext-s")
    parser.add_argument("--side", type=int, default=96, help="of the square images, in pixels")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--way", action="append", choices=(PEER, *WAYS), metavar="NAME")
    parser.add_argument("--json", type=Path)
    for name, kind in (("--one", str), ("--store", str), ("--rank", int)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options)), flush=True)
        # Gloo's threads may abort an interpreter that goes down.
        os._exit(0)
    predicted = predict(options.model, options.side)
    print(
        f"{options.model}: {predicted['parameters'] / 1e6:.1f} M parameters, all trained; "
        f"{predicted['activations'] / 1e9:.2f} GB of activations at {options.side} pixels"
    )
    print("GB of a rank           at start   in steps  predicted  predicted/in steps  seconds")
    results: dict[str, dict[str, float]] = {}
    for way in options.way or (PEER, *WAYS):
        found = results[way] = in_own_processes(way, options)
        text = f"{way:20} {found['start'] / 1e9:10.2f} {found['steps'] / 1e9:10.2f}"
        if way == PEER:
            text += f"{'':30}"
        else:
            found["predicted"] = predicted["totals"][way]
            text += f" {found['predicted'] / 1e9:10.2f} {found['predicted'] / found['steps']:18.2f}"
        print(f"{text} {found['seconds']:8.2f}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
