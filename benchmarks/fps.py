"""Images per second of a checkpoint: the model alone, and from encoded files to detections.

    python benchmarks/fps.py CHECKPOINT [--size 800x1088] [--batch 1] [--device cuda]

CHECKPOINT is an exported folder, a checkpoint folder, a run directory or a recipe. The model alone
gets normalised images that are on the device already, padded as the evaluation and the ONNX file
pad them. End to end is `LoadedDetector.predict` on one
JPEG file after another: read, decode, resize to the evaluation's size, forward, best detections.
Both are warmed up, and the median over the repeats is reported.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image

import pipeline
from pipeline.data.batch import Batch, collate, normalise
from pipeline.detectors.interface import Detector
from pipeline.errors import LongtailError, RecipeError
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


def random_images(loaded: LoadedDetector, size: Size, number: int) -> Batch:
    """`number` images of noise, padded as the evaluation pads those of this size."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator)
    divisor = loaded.recipe.data.transforms.size_divisor
    return collate([image] * number, [], [], [], divisor).to(loaded.device)


def model_alone(loaded: LoadedDetector, batch: Batch, warm_up: int, repeats: int) -> float:
    """Seconds for a forward of the batch, which is normalised before the clock."""
    preprocessing = cast(Detector, loaded.detector)
    mean, std = preprocessing.pixel_mean, preprocessing.pixel_std
    pixels = normalise(batch.images, batch.mask, mean, std)

    def forward() -> None:
        with torch.inference_mode():
            loaded.detector(pixels, batch.mask)

    return seconds(forward, loaded.device, warm_up, repeats)


def end_to_end(loaded: LoadedDetector, warm_up: int, repeats: int) -> float:
    """Seconds from a JPEG file to its detections."""
    width, height = PHOTOGRAPH
    coarse = np.random.default_rng(0).integers(0, 256, (height // 16, width // 16, 3), np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "photograph.jpg")
        Image.fromarray(coarse).resize(PHOTOGRAPH, Image.Resampling.BICUBIC).save(path, quality=90)
        return seconds(lambda: loaded.predict([path]), loaded.device, warm_up, repeats)


def at_least(minimum: int, text: str) -> int:
    """An integer of the command line that is not smaller."""
    try:
        number = int(text)
    except ValueError:
        number = minimum - 1
    if number < minimum:
        raise argparse.ArgumentTypeError(f"{text!r} must be an integer of {minimum} or more")
    return number


def main() -> int:
    """Measure; what the user did wrong is one paragraph on stderr."""
    try:
        measure(read_arguments())
    except LongtailError as error:
        print(f"fps: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkpoint", help="exported folder, checkpoint, run directory or recipe")
    one, none = partial(at_least, 1), partial(at_least, 0)
    parser.add_argument("--size", metavar="HxW", help="of the model alone; the evaluation's")
    parser.add_argument("--batch", type=one, default=1, help="images a forward, model alone (1)")
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where to compute; a GPU if there is one",
    )
    parser.add_argument("--warm-up", type=none, default=5, help="forwards before the clock (5)")
    parser.add_argument("--repeats", type=one, default=30, help="timed forwards (30)")
    return parser.parse_args()


def measure(arguments: argparse.Namespace) -> None:
    """Print one line for each figure."""
    size = parse_size(arguments.size) if arguments.size else None
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise RecipeError("--device cuda: torch finds no GPU here; leave it out, or give cpu")
    loaded = pipeline.load_detector(arguments.checkpoint, device=arguments.device)
    size = size or default_size(loaded.recipe.data.transforms)
    device = loaded.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    parameters = sum(parameter.numel() for parameter in loaded.detector.parameters())
    print(
        f"{loaded.directory}: {parameters:,} parameters, {loaded.vocabulary.num_categories} "
        f"categories; {name}, {torch.get_num_threads()} threads, torch {torch.__version__}, float32"
    )
    repeats = arguments.warm_up, arguments.repeats
    batch = random_images(loaded, size, arguments.batch)
    alone = model_alone(loaded, batch, *repeats)
    whole, padded = ("x".join(map(str, shape)) for shape in (size, batch.mask.shape[1:]))
    print(
        f"model alone: {arguments.batch / alone:.2f} images per second ({1000 * alone:.1f} ms for "
        f"{arguments.batch} of {whole} padded to {padded}, median of {arguments.repeats})"
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
    sys.exit(main())
