"""Images per second of a checkpoint: the model alone, and from encoded files to detections.

    python benchmarks/fps.py CHECKPOINT [--size 800x1088] [--batch 1] [--device cuda]

CHECKPOINT is an exported folder, a checkpoint folder, a run directory or a recipe. The model alone
gets normalised images that are on the device already. End to end is `LoadedDetector.predict` on one
JPEG file after another: read, decode, resize to the evaluation's size, forward, best detections.
Both are warmed up, and the median over the repeats is reported.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import pipeline
from pipeline.evaluation.onnx_export import Size, default_size, parse_size
from pipeline.evaluation.predict import LoadedDetector

PHOTOGRAPH = 640, 480
"""Width and height of the file that is read end to end: those of most COCO photographs."""


def seconds(work: Callable[[], object], device: torch.device, warm_up: int, repeats: int) -> float:
    """Median time of `work`, with the device's queue empty before and after."""

    def once() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begun = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begun

    for _ in range(warm_up):
        once()
    return statistics.median(once() for _ in range(repeats))


def model_alone(
    loaded: LoadedDetector, size: Size, batch: int, warm_up: int, repeats: int
) -> float:
    """Seconds for a forward of `batch` images without padding."""
    images = torch.randn((batch, 3, *size), device=loaded.device)
    mask = torch.zeros((batch, *size), dtype=torch.bool, device=loaded.device)

    def forward() -> None:
        with torch.inference_mode():
            loaded.detector(images, mask)

    return seconds(forward, loaded.device, warm_up, repeats)


def end_to_end(loaded: LoadedDetector, warm_up: int, repeats: int) -> float:
    """Seconds from a JPEG file to its detections."""
    width, height = PHOTOGRAPH
    coarse = np.random.default_rng(0).integers(0, 256, (height // 16, width // 16, 3), np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "photograph.jpg")
        Image.fromarray(coarse).resize(PHOTOGRAPH, Image.Resampling.BICUBIC).save(path, quality=90)
        return seconds(lambda: loaded.predict([path]), loaded.device, warm_up, repeats)


def main() -> None:
    """Measure, and print one line for each figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkpoint", help="exported folder, checkpoint, run directory or recipe")
    parser.add_argument("--size", type=parse_size, help="HxW of the model alone; the evaluation's")
    parser.add_argument("--batch", type=int, default=1, help="images a forward, model alone (1)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--warm-up", type=int, default=5, help="forwards before the clock (5)")
    parser.add_argument("--repeats", type=int, default=30, help="timed forwards (30)")
    arguments = parser.parse_args()
    loaded = pipeline.load_detector(arguments.checkpoint, device=arguments.device)
    size = arguments.size or default_size(loaded.recipe.data.transforms)
    device = loaded.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    parameters = sum(parameter.numel() for parameter in loaded.detector.parameters())
    print(
        f"{loaded.directory}: {parameters:,} parameters, {loaded.vocabulary.num_categories} "
        f"categories; {name}, {torch.get_num_threads()} threads, torch {torch.__version__}, float32"
    )
    repeats = arguments.warm_up, arguments.repeats
    alone = model_alone(loaded, size, arguments.batch, *repeats)
    print(
        f"model alone: {arguments.batch / alone:.2f} images per second ({1000 * alone:.1f} ms for "
        f"{arguments.batch} of {size[0]}x{size[1]}, median of {arguments.repeats})"
    )
    both = end_to_end(loaded, *repeats)
    transforms = loaded.recipe.data.transforms
    print(
        f"end to end: {1 / both:.2f} images per second ({1000 * both:.1f} ms for a JPEG of "
        f"{PHOTOGRAPH[1]}x{PHOTOGRAPH[0]}, looked at with short side "
        f"{transforms.evaluation_short_side} and at most {transforms.evaluation_max_side}, median "
        f"of {arguments.repeats})"
    )


if __name__ == "__main__":
    main()
