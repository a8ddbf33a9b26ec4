"""Times the ways to sample of deformable attention beside each other and beside a peer.

    python benchmarks/deformable_attention.py            # one thread, then two
    python benchmarks/deformable_attention.py --threads 1 --repeat 9

Shapes are those of a 640x800 image, batch 1: the encoder's (each of 10,630 cells is a query, and
samples lie some cells around it) and the decoder's (1,100 queries, samples within boxes); 8 heads
of 32, 4 levels, 4 points, float32. Every row is a process of its own. Given are the least wall and
processor time of all repetitions, which a busy machine disturbs least, and how much the peak of
resident memory grew over that of the inputs. `autograd` is the composition of PyTorch's operators
that tracers see; `transformers` is that package's function, where it is installed.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.detectors.sampling import compiled, plain, portable
from pipeline.detectors.sampling.compiler import Kernel, load_kernel

SHAPES = [(80, 100), (40, 50), (20, 25), (10, 13)]
HEADS, DEPTH, POINTS = 8, 32, 4
DECODER_QUERIES = 1100
Sample = Callable[[Tensor, list[tuple[int, int]], Tensor, Tensor], Tensor]


def transformers_sample() -> Sample:
    from transformers.models.deformable_detr.modeling_deformable_detr import (
        MultiScaleDeformableAttention,
    )

    module = MultiScaleDeformableAttention()
    sizes = torch.tensor(SHAPES)
    starts = sizes.prod(1).cumsum(0) - sizes.prod(1)

    def sample(value: Tensor, shapes: object, locations: Tensor, weights: Tensor) -> Tensor:
        return module(value, sizes, SHAPES, starts, locations, weights, 64)

    return sample


def compiled_sample() -> Sample:
    kernel = load_kernel()
    if not isinstance(kernel, Kernel):
        sys.exit(f"no kernel was compiled: {kernel}")
    return partial(compiled.sample_and_sum, kernel=kernel)


WAYS: dict[str, Callable[[], Sample]] = {
    "autograd": lambda: plain.sample_and_sum,
    "transformers": transformers_sample,
    "portable": lambda: portable.sample_and_sum,
    "compiled": compiled_sample,
}


def inputs(scene: str) -> tuple[Tensor, Tensor, Tensor]:
    """Value, locations and weights."""
    generator = torch.Generator().manual_seed(0)
    cells, levels = sum(h * w for h, w in SHAPES), len(SHAPES)
    value = torch.randn(1, cells, HEADS, DEPTH, generator=generator)
    if scene == "encoder":
        centres = [
            torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w).flip(1)
            for h, w in SHAPES
        ]
        reference = torch.cat(centres)[:, None, None, None]
        widths = torch.tensor([(w, h) for h, w in SHAPES])[:, None]
        size = (len(reference), HEADS, levels, POINTS, 2)
        locations = reference + torch.randn(size, generator=generator) * 2.5 / widths
    else:
        boxes = torch.rand(DECODER_QUERIES, 1, 1, 1, 4, generator=generator)
        size = (DECODER_QUERIES, HEADS, levels, POINTS, 2)
        inside = torch.rand(size, generator=generator) - 0.5
        locations = boxes[..., :2] + inside * 0.3 * boxes[..., 2:]
    logits = torch.randn(len(locations), HEADS, levels * POINTS, generator=generator)
    weights = logits.softmax(-1).unflatten(2, (levels, POINTS))
    return value, locations[None].contiguous(), weights[None]


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(way: str, scene: str, threads: int, repeat: int) -> dict[str, float]:
    """Milliseconds of wall (and of processor) time, forward and backward, and MiB."""
    torch.set_num_threads(threads)
    sample = WAYS[way]()
    value, locations, weights = (x.requires_grad_() for x in inputs(scene))
    before = peak_mib()
    laps: dict[str, list[float]] = {}

    def clock(name: str, work: Callable[[], object]) -> object:
        wall, processor = time.perf_counter(), time.process_time()
        result = work()
        laps.setdefault(f"{name} cpu", []).append(time.process_time() - processor)
        laps.setdefault(name, []).append(time.perf_counter() - wall)
        return result

    for _ in range(repeat):
        value.grad = locations.grad = weights.grad = None
        output = clock("forward", lambda: sample(value, SHAPES, locations, weights))
        assert isinstance(output, Tensor)
        gradient = torch.ones_like(output)
        clock("backward", partial(output.backward, gradient))
        del output, gradient
    return {name: 1000 * min(times) for name, times in laps.items()} | {
        "memory": peak_mib() - before
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one, options.threads[0], options.repeat)))
        return
    ways = [way for way in WAYS if way != "transformers" or find_spec("transformers")]
    print(f"torch {torch.__version__}; least of {options.repeat}; wall (processor) milliseconds")
    for threads in options.threads:
        for scene in ("encoder", "decoder"):
            print(f"\n{scene}, {threads} thread{'s' * (threads > 1)}")
            print(f"{'':14}{'forward':>17}{'backward':>17}{'both':>9}{'ratio':>8}{'MiB':>7}")
            first = 0.0
            for way in ways:
                figures = row(way, scene, threads, options.repeat)
                both = figures["forward"] + figures["backward"]
                first = first or both
                parts = "".join(
                    f"{figures[name]:9.1f} ({figures[f'{name} cpu']:5.0f})"
                    for name in ("forward", "backward")
                )
                print(
                    f"{way:14}{parts}{both:9.1f}{first / both:7.1f}x{figures['memory']:7.0f}",
                    flush=True,
                )


def row(way: str, scene: str, threads: int, repeat: int) -> dict[str, float]:
    """The figures of one way, from a process of its own."""
    command = [sys.executable, __file__, "--one", way, scene, "--threads", str(threads)]
    done = subprocess.run(
        [*command, "--repeat", str(repeat)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{way}, {scene}: {done.stderr.strip()}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


if __name__ == "__main__":
    main()
