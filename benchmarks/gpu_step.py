"""Milliseconds and memory of a training step on a GPU, and how far it is from the floor.

    python benchmarks/gpu_step.py [--backbones resnet50,...] [--batches 2,8] [--size 800x1333]
                                  [--precisions float32,bfloat16] [--kernels portable,auto]
                                  [--compile] [--json FILE]

Plain DINO 4-scale with 1203 categories and 13 boxes an image: forward, criterion, backward. Each
configuration runs in a process of its own, so that one that runs out of memory says so and the next
begins afresh. Time is the median of the steps, measured with the device's queue drained before and
after; memory is the most that was allocated. The share of each part is of one more step, in which
the queue is drained around each part.

The floor is a roofline: for each operation the larger of its arithmetic at the peak rate and of
its inputs and outputs, each moved once, at the peak bandwidth, summed over a step. It is a
yardstick, not a bound: a fused program moves less, and look-ups are counted with their whole
tables. Rates are those of the device's data sheet where it is known below, else `--tflops` and
`--bandwidth`. `--device cpu` is for trying the command out.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from step import Case, Subject, plain_dino, timed
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from pipeline.detectors import attention

DATA_SHEETS = {
    # float32 outside the tensor cores, bfloat16 dense, both in TFLOP/s; TB/s.
    "H200": {"float32": 67.0, "bfloat16": 989.0, "bandwidth": 4.8},
    "H100": {"float32": 67.0, "bfloat16": 989.0, "bandwidth": 3.35},
    "A100": {"float32": 19.5, "bfloat16": 312.0, "bandwidth": 2.0},
}


class Roofline(TorchDispatchMode):
    """Adds up, over the operations under it, the least time that the device needs for each."""

    def __init__(self, flops_per_second: float, bytes_per_second: float) -> None:
        super().__init__()
        self.flops_per_second, self.bytes_per_second = flops_per_second, bytes_per_second
        self.seconds = self.flops = self.bytes = 0.0

    def add(self, flops: float, moved: float) -> None:
        """Count one operation."""
        self.seconds += max(flops / self.flops_per_second, moved / self.bytes_per_second)
        self.flops += flops
        self.bytes += moved

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            count = flop_registry.get(func._overloadpacket)
            flops = count(*args, **(kwargs or {}), out_val=result) if count else 0
            tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
            self.add(flops, sum(x.numel() * x.element_size() for x in tensors))
        return result


def _count_sampling(roofline: Roofline) -> Callable[[], None]:
    """Count deformable sampling by hand while a kernel of its own hides it; undo with the result.

    The backward pass reads what the forward pass did and the gradient of its output, and writes
    three gradients: about twice the forward's bytes.
    """
    inner = attention.sample_and_sum

    def counted(value: Tensor, *others: Any, **named: Any) -> Tensor:
        output = inner(value, *others, **named)
        tensors = [x for x in (value, *others, output) if isinstance(x, Tensor)]
        roofline.add(0, 3 * sum(x.numel() * x.element_size() for x in tensors))
        return output

    attention.sample_and_sum = counted  # type: ignore[assignment]

    def undo() -> None:
        attention.sample_and_sum = inner

    return undo


def _forward(subject: Subject, device: torch.device, precision: str) -> Tensor:
    subject.model.zero_grad()
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        return subject.loss()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Time, memory, shares and floor of one configuration, in this process."""
    device = torch.device(options.device)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False  # Convolutions have a switch of their own.
    torch.manual_seed(0)
    case = Case.parse(f"{options.size}:{options.batches}")
    subject = plain_dino(case, options.backbones, options.kernels, device)
    if options.compile:
        subject.model.backbone.compile()  # type: ignore[operator,union-attr]
    subject.model.train()

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    seconds = []
    for repeat in range(options.repeats + 3):
        begun = now()
        _forward(subject, device, options.precisions).backward()
        if repeat >= 3:
            seconds.append(now() - begun)
    result: dict[str, Any] = {"seconds": statistics.median(seconds)}
    if device.type == "cuda":
        result["memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    result |= _floor(subject, device, options)
    spent = timed(subject.parts, now)
    begun = now()
    loss = _forward(subject, device, options.precisions)
    middle = now()
    loss.backward()
    ended = now()
    shares = {name: part / (ended - begun) for name, part in spent.items()}
    result["shares"] = shares | {"backward": (ended - middle) / (ended - begun)}
    return result


def _floor(subject: Subject, device: torch.device, options: argparse.Namespace) -> dict[str, float]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    sheet = next((DATA_SHEETS[key] for key in DATA_SHEETS if key in name), None)
    tflops = options.tflops or (sheet and sheet[options.precisions])
    bandwidth = options.bandwidth or (sheet and sheet["bandwidth"])
    if not tflops or not bandwidth:
        return {}
    roofline = Roofline(tflops * 1e12, bandwidth * 1e12)
    undo = _count_sampling(roofline) if options.kernels == "auto" else None
    with roofline:
        _forward(subject, device, options.precisions).backward()
    if undo:
        undo()
    return {
        "floor_seconds": roofline.seconds,
        "tflop": roofline.flops / 1e12,
        "gigabytes_moved": roofline.bytes / 1e9,
    }


def _row(result: dict[str, Any]) -> str:
    if "error" in result:
        return str(result["error"])
    text = f"{result['seconds'] * 1e3:8.1f} ms"
    if "memory_gb" in result:
        text += f"  {result['memory_gb']:6.2f} GB"
    if "floor_seconds" in result:
        floor = result["floor_seconds"]
        text += f"  floor {floor * 1e3:7.1f} ms, {result['seconds'] / floor:.1f}x"
    shares = ", ".join(f"{name} {share:.0%}" for name, share in result["shares"].items())
    return f"{text}  {shares}"


def _in_own_process(configuration: dict[str, str], options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", f"--device={options.device}"]
    command += [f"--size={options.size}", f"--repeats={options.repeats}"]
    command += [f"--{name}={value}" for name, value in configuration.items()]
    command += ["--compile"] if options.compile else []
    for name in ("tflops", "bandwidth"):
        value = getattr(options, name)
        command += [f"--{name}={value}"] if value else []
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        lines = ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"]
        return {"error": lines[-1][:200]}
    result: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return result


def main() -> int:
    """Measure every combination of the options and print a line for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbones", default="resnet50,swin_large_patch4_window12_384")
    parser.add_argument("--batches", default="2,8")
    parser.add_argument("--precisions", default="float32,bfloat16")
    parser.add_argument("--kernels", default="portable,auto")
    parser.add_argument("--size", default="800x1333")
    parser.add_argument("--compile", action="store_true", help="torch.compile the backbone")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tflops", type=float)
    parser.add_argument("--bandwidth", type=float, help="TB/s")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options)))
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here; nothing was measured")
        return 1
    results = []
    print(f"{options.size}, torch {torch.__version__}, {options.device}")
    for backbone in options.backbones.split(","):
        for batch in options.batches.split(","):
            for precision in options.precisions.split(","):
                for kernel in options.kernels.split(","):
                    names = ("backbones", "batches", "precisions", "kernels")
                    values = (backbone, batch, precision, kernel)
                    configuration = dict(zip(names, values, strict=True))
                    result = _in_own_process(configuration, options)
                    results.append(configuration | result)
                    print(f"{' '.join(values):50} {_row(result)}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return int(all("error" in result for result in results))


if __name__ == "__main__":
    sys.exit(main())
