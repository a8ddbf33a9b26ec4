"""Run directories as a training run leaves them, made up for the report's tests."""

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from pipeline.evaluation.detections import Detections, parse_detections
from pipeline.evaluation.examples import save_examples
from pipeline.evaluation.ground_truth import parse_ground_truth
from pipeline.evaluation.results import evaluate_detections, evaluation_dir, write_results
from pipeline.recipe_file import recipe_from_tree

SOURCE = {"name": "lvis", "format": "lvis", "images": "lvis", "annotations": "lvis.json"}


def write_recipe(run_dir: Path, steps: int, **sections: Any) -> None:
    """A recipe named after its folder; `sections` replace whole sections of it."""
    run_dir.mkdir(parents=True, exist_ok=True)
    recipe = recipe_from_tree(
        {
            "name": run_dir.name,
            "description": "Fine-tuning with soft labels & image-level extra data.",
            "data": {"root": "data", "train": [SOURCE]},
            "training": {"steps": steps},
            **sections,
        },
        "test",
    )
    (run_dir / "recipe.yaml").write_text(recipe.to_yaml())


def write_environment(run_dir: Path) -> None:
    packages = {"torch": "2.15.0", "open-clip-torch": "3.3.0", "numpy": "2.4.6", "tqdm": "4.70.1"}
    environment = {
        "python": "3.11.7",
        "platform": "Linux-6.1-x86_64 <libc>",
        "processors": 16,
        "world_size": 4,
        "devices": ["NVIDIA H200"] * 4,
        "deformable_attention": "Triton",
        "packages": packages,
    }
    (run_dir / "environment.json").write_text(json.dumps(environment))


def log_evaluation(run_dir: Path, step: int, ap: float, **more: Any) -> None:
    """An evaluation as it is logged while the run goes on, without a folder of its own."""
    figures = {"AP": ap, "AP50": ap * 1.6, "APr": ap * 0.7, "APc": ap, "APf": ap * 1.2}
    line = {"event": "evaluation", "step": step, **figures, **more}
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def consumed(samples: int) -> dict[str, Any]:
    return {
        "samples": {"lvis": samples, "imagenet_lvis": samples // 2},
        "instances": {"r": samples // 50, "c": samples // 2, "f": samples * 7},
    }


def step_event(step: int, steps: int, rng: np.random.Generator, extra: bool) -> dict[str, Any]:
    fall = math.exp(-3 * step / steps)
    terms = {}
    for base, size in (("class", 1.2), ("box_l1", 0.9), ("box_giou", 1.4), ("semantic", 0.8)):
        suffixes = ["", "_dn"] if base == "semantic" else ["", "_dn", "_encoder", "_0", "_1"]
        for suffix in suffixes:
            scale = size * (0.3 + 0.7 * fall) * (0.7 if "dn" in suffix else 1.0)
            off = extra and base.startswith("box")
            terms[f"loss/{base}{suffix}"] = 0.0 if off else scale * float(rng.lognormal(0, 0.12))
    return {
        "event": "step",
        "step": step,
        "loss": sum(terms.values()),
        **terms,
        "learning_rate": 2e-4 * min(1.0, step / 40) * (0.1 if step > 0.8 * steps else 1.0),
        "grad_norm": float(rng.lognormal(0.5, 0.3)),
        "images_per_second": float(rng.normal(6.2, 0.4)),
        "data_wait": 0.12 + 0.05 * float(rng.random()),
        "teacher_wait": 0.2,
        "seconds": 2.4,
        "samples": {"imagenet_lvis" if extra else "lvis": 16},
        "epochs": {"lvis": 3 * step / steps, "imagenet_lvis": step / steps / 8},
        "memory_gb": 3.1 + 0.4 * step / steps,
        "gpu_memory_gb": 11.5 + (0.2 if extra else 0.0),
        "stream": "extra" if extra else "train",
    }


def write_metrics(run_dir: Path, steps: int, total: int, extra: bool = False) -> None:
    rng = np.random.default_rng(0)
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            event = step_event(step, total, rng, extra and step % 2 == 0)
            file.write(json.dumps(event) + "\n")


def photograph(image_id: int) -> bytes:
    picture = Image.new("RGB", (320, 240), (90 + image_id % 100, 120, 100))
    ImageDraw.Draw(picture).ellipse((60, 60, 160, 150), fill="orange")
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG")
    return buffer.getvalue()


def write_evaluation(
    run_dir: Path, step: int, skill: float, num_categories: int = 60, seed: int = 1
) -> None:
    """An evaluation whose AP grows with `skill` and with a category's training images; `seed` is
    of the detections, the ground truth is the same for all."""
    rng, noise = np.random.default_rng(1), np.random.default_rng(seed)
    counts = np.maximum(1, (2000 / np.arange(1, num_categories + 1) ** 1.45)).astype(int)
    categories, images, annotations, rows = [], [], [], []
    for column, count in enumerate(counts.tolist()):
        frequency = "r" if count <= 10 else "c" if count <= 100 else "f"
        name = f"striped <thing> {column + 1}"
        category = {"id": column + 1, "name": name, "frequency": frequency}
        categories.append(category | {"image_count": count})
    for image_id in range(1, max(31, num_categories // 4)):
        lists = {"neg_category_ids": [1, 2, 3], "not_exhaustive_category_ids": []}
        images.append({"id": image_id} | lists)
        for _ in range(4):
            column = int(rng.integers(num_categories))
            bbox = [*rng.uniform(0, 150, 2).tolist(), *rng.uniform(30, 90, 2).tolist()]
            placed = {"image_id": image_id, "category_id": column + 1}
            box = {"id": len(annotations) + 1, "bbox": bbox, "area": bbox[2] * bbox[3]}
            annotations.append(placed | box)
            quality = skill * min(1.0, 0.3 + math.log10(counts[column]) / 3)
            moved = np.array(bbox) + noise.normal(0, 12 * (1.1 - quality), 4)
            score = float(np.clip(quality * noise.uniform(0.4, 1.1), 0.01, 0.99))
            rows.append(placed | {"bbox": np.maximum(moved, 1).tolist(), "score": score})
    tree = {"images": images, "annotations": annotations, "categories": categories}
    detections: Detections = parse_detections(rows)
    folder = evaluation_dir(run_dir, step)
    folder.mkdir(parents=True, exist_ok=True)
    save_examples(folder, parse_ground_truth(tree), detections, photograph, 6)
    write_results(run_dir, step, evaluate_detections(tree, detections), detections)
