"""The memory that `longtail check` predicts, beside what a training step is measured to hold.

    python benchmarks/predicted_memory.py [--case NAME ...] [--json FILE]

Each case trains in a process of its own, on the CPU and one thread: two forward and backward passes
whose gradients add up, with a step of AdamW after the first. Measured is how far the
largest resident set of the process is above what it was before the model. Predicted are weights,
gradients, two moments, and the counted activations (`pipeline/check/activations.py`); nothing of
the prediction is fitted to the measurements.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from pipeline.check.activations import MicroBatch, meta_student, step_bytes, targets_of
from pipeline.detectors import build_detector
from pipeline.detectors.interface import LossContext
from pipeline.detectors.memory import training_memory
from pipeline.recipe import Recipe
from pipeline.semantics.branch import SemanticBranch
from pipeline.training.student import Student

NUM_CATEGORIES, NUM_BOXES, TEXT_DIM = 1203, 13, 1024
SWIN_T = "swin_tiny_patch4_window7_224"


class Case(NamedTuple):
    """Height and width of the images, how many, and what differs from DINO with a ResNet-50."""

    height: int
    width: int
    images: int
    backbone: str = "resnet50"
    richsem: bool = False
    checkpointing: bool = False
    precision: str = "float32"


CASES = {
    "r50 256x256:1": Case(256, 256, 1),
    "r50 256x256:2": Case(256, 256, 2),
    "r50 640x800:1": Case(640, 800, 1),
    "r50 480x640:1 richsem": Case(480, 640, 1, richsem=True),
    "swin-t 256x256:2": Case(256, 256, 2, SWIN_T),
    "swin-t 480x640:1": Case(480, 640, 1, SWIN_T),
    "swin-t 480x640:1 checkpointing": Case(480, 640, 1, SWIN_T, checkpointing=True),
    "r50 256x256:2 bfloat16": Case(256, 256, 2, precision="bfloat16"),
}


def recipe_of(case: Case) -> Recipe:
    """As much of a recipe as a student follows from."""
    resnet = case.backbone == "resnet50"
    lvis = {"name": "lvis", "format": "lvis", "images": "coco", "annotations": "lvis.json"}
    backbone = {
        "name": case.backbone,
        "weights": None,
        "norm": "group" if resnet else "frozen",
        "out_indices": [2, 3, 4] if resnet else [1, 2, 3],
        "frozen_stages": 2 if resnet else 0,
        "checkpointed_stages": 4 if case.checkpointing else 0,
    }
    tree: dict[str, Any] = {
        "name": "predicted",
        "initialize_from": "published",  # Frozen norms need trained weights, or a run before.
        "data": {"root": ".", "train": [lvis]},
        "detector": {
            "backbone": backbone,
            "class_head": {"kind": "language" if case.richsem else "linear"},
            "losses": {"federated_categories": 50 if case.richsem else 0},
        },
        "training": {
            "steps": 10,
            "precision": case.precision,
            "activation_checkpointing": case.checkpointing,
        },
    }
    return Recipe.model_validate(tree if case.richsem else tree | {"semantic": None})


def micro_batch(case: Case) -> MicroBatch:
    """What both train on."""
    columns = 50 if case.richsem else NUM_CATEGORIES
    return MicroBatch(case.images, case.height, case.width, NUM_BOXES, columns)


def predict(case: Case) -> dict[str, float]:
    """Bytes by part."""
    recipe = recipe_of(case)
    student = meta_student(recipe, NUM_CATEGORIES)
    fixed = training_memory(student)
    return {
        "fixed": fixed.total,
        "activations": step_bytes(student, micro_batch(case), on_gpu=False).peak,
    }


def measure(case: Case) -> dict[str, float]:
    """Bytes of this process above those from before the model."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    recipe, batch, before = recipe_of(case), micro_batch(case), held("VmRSS")
    text = F.normalize(torch.randn(NUM_CATEGORIES, TEXT_DIM), dim=-1) if case.richsem else None
    detector = build_detector(
        recipe.detector, num_categories=NUM_CATEGORIES, text_embeddings=text, pretrained=False
    )
    detector.set_activation_checkpointing(recipe.training.activation_checkpointing)
    branch = None
    if text is not None and recipe.semantic is not None:
        branch = SemanticBranch(detector.feature_dim, text, 100.0, recipe.semantic)
    student = Student(detector, branch, recipe.semantic, case.precision).train()
    images = torch.randint(256, (case.images, 3, case.height, case.width), dtype=torch.uint8)
    mask = torch.zeros(case.images, case.height, case.width, dtype=torch.bool)
    columns = torch.arange(batch.columns) if batch.columns < NUM_CATEGORIES else None
    context = LossContext(float(case.images * NUM_BOXES), columns)
    soft = [torch.rand(NUM_BOXES, NUM_CATEGORIES).softmax(-1) for _ in range(case.images)]
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    for number in range(2):
        losses = student(images, mask, targets_of(batch), context, soft)
        torch.stack(list(losses.values())).sum().backward()
        del losses
        if number == 0:
            optimizer.step()
    return {"measured": held("VmHWM") - before}


def held(field: str) -> int:
    """Bytes: `VmHWM`, the largest resident set so far, or `VmRSS`, that of now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/self/status has no {field}")


def in_own_process(name: str, what: str) -> dict[str, float]:
    """`predict` or `measure` of a case."""
    command = [sys.executable, __file__, "--one", what, "--case", name]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if ended.returncode:
        raise SystemExit(f"{name}: {what} ended with {ended.returncode}; its error stands above")
    result: dict[str, float] = json.loads(ended.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Print a line for each case."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", action="append", choices=CASES, metavar="NAME")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", choices=("predict", "measure"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        work = predict if options.one == "predict" else measure
        print(json.dumps(work(CASES[options.case[0]])))
        return
    print(f"{'GB':32} fixed  activations  predicted  measured  predicted/measured")
    results = {}
    for name in options.case or CASES:
        result = in_own_process(name, "predict") | in_own_process(name, "measure")
        total = result["fixed"] + result["activations"]
        results[name] = result
        print(
            f"{name:32} {result['fixed'] / 1e9:5.2f} {result['activations'] / 1e9:12.2f} "
            f"{total / 1e9:10.2f} {result['measured'] / 1e9:9.2f} "
            f"{total / result['measured']:19.2f}",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
