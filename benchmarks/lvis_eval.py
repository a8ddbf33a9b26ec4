"""LVIS evaluators side by side: the official package, faster-coco-eval and ours.

    python benchmarks/lvis_eval.py             1/20 and 1/4 of LVIS val side by side, ours in full
    python benchmarks/lvis_eval.py --scales 20 --no-full
    python benchmarks/lvis_eval.py --read      ours reads the detections' json, timed apart

Annotations and detections of the size of LVIS v1 val are drawn at random: 19,809 images, 1203
categories with a Zipf tail, 12 boxes an image, 300 detections an image (5.9 million). Each
evaluator runs in a process of its own, one after another, and starts from what it takes, made
before the clock: the packages from the entries of the two json files as Python objects (they index
them themselves), ours from arrays, which parsing the files gives it; `--read` times the reading of
its detections apart. Nothing else is held: no arrays beside the packages, no entries beside ours.
Packages compute one protocol, ours three with their curves. Wall time and CPU time are those of the
evaluation; memory is the process's largest resident size during it, with its input and libraries.
"""

import argparse
import contextlib
import ctypes
import gc
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.evaluation.detections import Detections, load_detections
from pipeline.evaluation.federated_ap import LVIS
from pipeline.evaluation.ground_truth import GroundTruth, parse_ground_truth

NUM_IMAGES, NUM_CATEGORIES, BOXES_PER_IMAGE, PER_IMAGE = 19_809, 1203, 12.35, 300
KEYS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf", "AR@300")
FASTER_KEYS = {
    "AP": "AP_all", "AP50": "AP_50", "AP75": "AP_75", "APs": "AP_small", "APm": "AP_medium",
    "APl": "AP_large", "APr": "APr", "APc": "APc", "APf": "APf", "AR@300": "AR_all",
}  # fmt: skip

Tree = dict[str, Any]
Figures = dict[str, float]


def draw_annotations(rng: np.random.Generator, num_images: int) -> Tree:
    """LVIS annotations with the figures of v1 val, but for the number of images."""
    popularity = 1 / np.arange(1, NUM_CATEGORIES + 1) ** 1.1
    popularity /= popularity.sum()
    images, annotations = [], []
    for image_id in range(1, num_images + 1):
        present = np.unique(rng.choice(NUM_CATEGORIES, 4, p=popularity))
        absent = np.setdiff1d(rng.choice(NUM_CATEGORIES, 10), present)
        images.append(
            {
                "id": image_id,
                "width": 640,
                "height": 480,
                "neg_category_ids": (absent + 1).tolist(),
                "not_exhaustive_category_ids": (
                    present[rng.random(len(present)) < 0.04] + 1
                ).tolist(),
            }
        )
        for column in rng.choice(present, rng.poisson(BOXES_PER_IMAGE)).tolist():
            size = np.exp(rng.uniform(np.log(8), np.log(400), 2)).clip(max=(640, 480))
            low = rng.uniform(0, (640, 480) - size)
            area = float(size.prod()) * 0.7
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": column + 1,
                    "bbox": [*low.tolist(), *size.tolist()],
                    "area": area,
                }
            )
    bounds = (405, 866)  # 405 frequent, 461 common and 337 rare categories
    categories = [
        {"id": i + 1, "name": f"category {i + 1}", "frequency": "fcr"[sum(i >= b for b in bounds)]}
        for i in range(NUM_CATEGORIES)
    ]
    return {"images": images, "annotations": annotations, "categories": categories}


def draw_detections(rng: np.random.Generator, truth: GroundTruth) -> Detections:
    """300 an image: each box found three times with noise, the rest of other categories."""
    num_images = len(truth.image_ids)
    rows = np.repeat(np.arange(len(truth.image)), 3)
    noise = rng.normal(0, 0.12, (len(rows), 4))
    found = truth.bbox[rows]
    size = found[:, 2:] * np.exp(noise[:, 2:])
    found = np.concatenate([found[:, :2] + noise[:, :2] * found[:, 2:], size], axis=1)
    extra = np.maximum(PER_IMAGE - np.bincount(truth.image[rows], minlength=num_images), 0)
    size = np.exp(rng.uniform(np.log(8), np.log(400), (int(extra.sum()), 2)))
    false = np.concatenate([rng.uniform(0, 400, size.shape), size], axis=1)
    image = np.concatenate([truth.image[rows], np.repeat(np.arange(num_images), extra)])
    column = np.concatenate([truth.column[rows], rng.integers(0, NUM_CATEGORIES, len(false))])
    score = np.concatenate([rng.beta(2, 2, len(rows)), rng.beta(1, 6, len(false))])
    order = np.lexsort((-score, image))
    return Detections(
        truth.image_ids[image[order]],
        truth.category_ids[column[order]],
        np.concatenate([found, false])[order],
        score[order],
    )


def ours(tree: Tree, truth: GroundTruth, found: Detections) -> Callable[[], Figures]:
    """All three protocols, curves and per-category figures included."""
    from pipeline.evaluation.results import evaluate_detections

    return lambda: evaluate_detections(truth, found)


def official(tree: Tree, truth: GroundTruth, found: Detections) -> Callable[[], Figures]:
    """The `lvis` package."""
    from pipeline.evaluation.official import run_package

    rows = list(found.to_rows())
    return lambda: run_package(tree, rows)  # type: ignore[return-value]


def faster(tree: Tree, truth: GroundTruth, found: Detections) -> Callable[[], Figures]:
    """faster-coco-eval with `lvis_style`."""
    from faster_coco_eval import COCO, COCOeval_faster

    logging.getLogger("faster_coco_eval").setLevel(logging.ERROR)
    rows = list(found.to_rows())
    for annotation in tree["annotations"]:
        annotation["iscrowd"] = 0

    def evaluate() -> Figures:
        annotations = COCO(tree)
        evaluation = COCOeval_faster(
            annotations,
            annotations.loadRes(rows),
            "bbox",
            lvis_style=True,
            print_function=lambda *_: None,
        )
        evaluation.params.maxDets = [PER_IMAGE]
        evaluation.run()
        stats = evaluation.stats_as_dict
        return {key: float(stats[name]) for key, name in FASTER_KEYS.items()}

    return evaluate


EVALUATORS = {"lvis 0.5.3": official, "faster-coco-eval": faster, "longtail": ours}


def measure(name: str, divisor: int, read: bool) -> dict[str, Any]:
    """Draw the data and evaluate it here; time, memory and figures."""
    rng = np.random.default_rng([0, divisor])
    tree = draw_annotations(rng, NUM_IMAGES // divisor)
    truth = parse_ground_truth(tree)
    found = draw_detections(rng, truth)
    result: dict[str, Any] = {"detections": len(found), "images": len(truth.image_ids)}
    if read:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "detections.json")
            found.save(path)
            begun = time.perf_counter()
            found = load_detections(path)
            result["read_seconds"] = time.perf_counter() - begun
    evaluate = EVALUATORS[name](tree, truth, found)
    del tree, truth, found  # what the evaluator does not start from is not charged to it
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what drawing the data has left behind is nobody's
    Path("/proc/self/clear_refs").write_text("5")  # starts the kernel's peak again
    begun, begun_cpu = time.perf_counter(), time.process_time()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        figures = evaluate()
    result["seconds"] = time.perf_counter() - begun
    result["cpu_seconds"] = time.process_time() - begun_cpu
    status = Path("/proc/self/status").read_text()
    result["peak"] = int(status.split("VmHWM:")[1].split()[0]) * 1024
    result["figures"] = {key: figures[key] for key in KEYS}
    return result


def measure_apart(name: str, divisor: int, read: bool) -> dict[str, Any]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--one", name, "--scales", str(divisor)]
    output = subprocess.run(
        command + ["--read"] * read, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def row(name: str, result: dict[str, Any], reference: dict[str, Any] | None) -> str:
    """One line of the table."""
    times = f"{result['seconds']:>9.1f} s{result['cpu_seconds']:>9.1f} s"
    columns = f"{name:<18}{times}{result['peak'] / 1e9:>8.2f} GB"
    if reference is not None and reference is not result:
        largest = max(abs(result["figures"][k] - reference["figures"][k]) for k in KEYS)
        speed = reference["seconds"] / result["seconds"]
        memory = reference["peak"] / result["peak"]
        columns += f"{speed:>9.1f}x{memory:>8.1f}x{largest:>12.1e}"
    if "read_seconds" in result:
        columns += f"   (json read in {result['read_seconds']:.1f} s)"
    return columns


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scales", type=int, nargs="+", default=[20, 4], help="parts of LVIS val")
    parser.add_argument("--full", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--read", action="store_true", help="read ours from a json file")
    parser.add_argument("--one", choices=EVALUATORS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.scales[0], arguments.read)))
        return
    print(f"protocol: {LVIS}; {os.cpu_count()} processors, numpy {np.__version__}")
    for divisor in arguments.scales:
        reference: dict[str, Any] | None = None
        for name in EVALUATORS:
            result = measure_apart(name, divisor, arguments.read and name == "longtail")
            if reference is None:
                reference = result
                print(
                    f"\n1/{divisor}: {result['images']:,} images, "
                    f"{result['detections']:,} detections\n"
                    f"{'':<18}{'time':>11}{'CPU time':>11}{'memory':>11}"
                    f"{'faster':>10}{'smaller':>9}{'difference':>12}"
                )
            print(row(name, result, reference), flush=True)
    if arguments.full:
        result = measure_apart("longtail", 1, arguments.read)
        print(f"\nfull: {result['images']:,} images, {result['detections']:,} detections")
        print(row("longtail", result, None))


if __name__ == "__main__":
    main()
