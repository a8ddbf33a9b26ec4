"""Time and memory of one training step (forward, criterion, backward), ours beside its peers.

    python benchmarks/step.py [--case 640x800:1] [--case 256x256:2] [--threads 1] [--repeats 5]
                              [--subjects longtail,...] [--precision float32] [--peer FILE.py]

Every subject is a ResNet-50 detector with 900 queries, 1203 categories and random weights. All see
the same random images with 13 boxes each; each runs in a process of its own. Times are CPU seconds,
the smallest of the repeats (other work on the machine only adds to them) after one step that is not
counted; memory is the largest resident set of the process. `times` is the figure divided by that of
`longtail`.

longtail            DINO 4-scale: linear class head, focal loss over all columns
longtail_portable   the same without the compiled sampling kernel
longtail_richsem    language class head, federated columns, semantic branch (soft labels given)
deformable_detr     transformers' two-stage Deformable DETR with box refinement: no denoising, but
                    else what the official DINO code does where its CUDA operator is missing
rt_detr             transformers' RT-DETR: attention on the coarsest map only

The peers need `pip install 'longtail[peers]'`. `--peer` adds a file of yours that defines
`subject(case) -> Subject` (`from step import Subject, draw`), such as an adapter of the official
DINO code.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.data.batch import Targets
from pipeline.detectors import build_detector
from pipeline.detectors.dino import detector as dino
from pipeline.detectors.interface import LossContext
from pipeline.recipe import DetectorSection, Semantic
from pipeline.semantics.branch import SemanticBranch
from pipeline.training.student import Student

NUM_CATEGORIES, NUM_QUERIES, NUM_BOXES, TEXT_DIM = 1203, 900, 13, 1024


class Case(NamedTuple):
    """Height and width of the images, and how many make the batch."""

    height: int
    width: int
    batch: int

    @classmethod
    def parse(cls, text: str) -> "Case":
        """`640x800:1`."""
        size, _, batch = text.partition(":")
        height, _, width = size.partition("x")
        return cls(int(height), int(width), int(batch or 1))

    def __str__(self) -> str:
        return f"{self.height}x{self.width}:{self.batch}"


class Drawn(NamedTuple):
    """`images` (B, 3, H, W) normalised, `boxes` (B, 13, 4) cxcywh, `labels` (B, 13)."""

    images: Tensor
    boxes: Tensor
    labels: Tensor


class Subject(NamedTuple):
    """A model, the step that gives its loss, and the callables (owner, attribute) whose share of
    the forward pass is shown."""

    model: nn.Module
    loss: Callable[[], Tensor]
    parts: Mapping[str, tuple[Any, str]]


def draw(case: Case) -> Drawn:
    """The same images and boxes for every subject."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(case.batch, 3, case.height, case.width, generator=generator)
    centre = torch.rand(case.batch, NUM_BOXES, 2, generator=generator) * 0.5 + 0.25
    extent = torch.rand(case.batch, NUM_BOXES, 2, generator=generator) * 0.4 + 0.05
    labels = torch.randint(NUM_CATEGORIES, (case.batch, NUM_BOXES), generator=generator)
    return Drawn(images, torch.cat([centre, extent], -1), labels)


def _targets(case: Case, drawn: Drawn) -> list[Targets]:
    size = case.height, case.width
    return [
        Targets(boxes, labels, i, size, size, seed=i)
        for i, (boxes, labels) in enumerate(zip(drawn.boxes, drawn.labels, strict=True))
    ]


def _parts(model: nn.Module) -> dict[str, tuple[Any, str]]:
    names = ("backbone", "encoder", "query_selection", "decoder")
    parts: dict[str, tuple[Any, str]] = {name: (getattr(model, name), "forward") for name in names}
    return parts | {"criterion": (dino, "compute_losses")}


def plain_dino(
    case: Case,
    backbone: str = "resnet50",
    kernel: str = "auto",
    device: torch.device | str = "cpu",
) -> Subject:
    """DINO 4-scale with a linear class head and the focal loss over all columns."""
    section = DetectorSection.model_validate(
        {
            "backbone": {"name": backbone, "weights": None},
            "class_head": {"kind": "linear"},
            "losses": {"federated_categories": 0},
            "kernel": kernel,
        }
    )
    detector = build_detector(section, num_categories=NUM_CATEGORIES, text_embeddings=None)
    detector.to(device)
    drawn = Drawn(*(part.to(device) for part in draw(case)))
    targets, mask = _targets(case, drawn), drawn.images.new_zeros(drawn.images[:, 0].shape).bool()
    context = LossContext(float(NUM_BOXES * case.batch), None)

    def loss() -> Tensor:
        output = detector(drawn.images, mask, targets, context)
        return torch.stack(list(output.losses.values())).sum()

    return Subject(detector, loss, _parts(detector))


def longtail_richsem(case: Case) -> Subject:
    """The whole student of RichSem."""
    generator = torch.Generator().manual_seed(2)
    text = F.normalize(torch.randn(NUM_CATEGORIES, TEXT_DIM, generator=generator), dim=-1)
    section = DetectorSection.model_validate({"backbone": {"weights": None}})
    detector = build_detector(section, num_categories=NUM_CATEGORIES, text_embeddings=text)
    student = Student(detector, SemanticBranch(detector.feature_dim, text, 100.0), Semantic())
    drawn = draw(case)
    pixels = (drawn.images * 58 + 115).clamp(0, 255).to(torch.uint8)
    targets, mask = _targets(case, drawn), drawn.images.new_zeros(drawn.images[:, 0].shape).bool()
    soft = torch.randn(case.batch, NUM_BOXES, NUM_CATEGORIES, generator=generator).softmax(-1)
    sampled = torch.randperm(NUM_CATEGORIES, generator=generator)[:50]
    context = LossContext(
        float(NUM_BOXES * case.batch), torch.cat([sampled, drawn.labels.flatten()]).unique()
    )

    def loss() -> Tensor:
        losses = student(pixels, mask, targets, context, list(soft))
        return torch.stack(list(losses.values())).sum()

    return Subject(student, loss, _parts(detector) | {"branch": (student.branch, "forward")})


def _labels(drawn: Drawn) -> list[dict[str, Tensor]]:
    return [
        {"class_labels": labels, "boxes": boxes}
        for labels, boxes in zip(drawn.labels, drawn.boxes, strict=True)
    ]


def _of_transformers(model: nn.Module, case: Case) -> Subject:
    drawn = draw(case)

    def loss() -> Tensor:
        result: Tensor = model(pixel_values=drawn.images, labels=_labels(drawn)).loss
        return result

    return Subject(model, loss, {})


def deformable_detr(case: Case) -> Subject:
    """Two-stage Deformable DETR with DINO's sizes."""
    import transformers

    config = transformers.DeformableDetrConfig(
        backbone_config=transformers.ResNetConfig(out_features=["stage2", "stage3", "stage4"]),
        num_labels=NUM_CATEGORIES,
        num_queries=NUM_QUERIES,
        two_stage=True,
        two_stage_num_proposals=NUM_QUERIES,
        with_box_refine=True,
        auxiliary_loss=True,
        encoder_ffn_dim=2048,
        decoder_ffn_dim=2048,
        dropout=0.0,
    )
    return _of_transformers(transformers.DeformableDetrForObjectDetection(config), case)


def rt_detr(case: Case) -> Subject:
    """RT-DETR with a ResNet-50 and 900 queries."""
    import transformers

    config = transformers.RTDetrConfig(num_labels=NUM_CATEGORIES, num_queries=NUM_QUERIES)
    return _of_transformers(transformers.RTDetrForObjectDetection(config), case)


SUBJECTS: dict[str, Callable[[Case], Subject]] = {
    "longtail": plain_dino,
    "longtail_portable": partial(plain_dino, kernel="portable"),
    "longtail_richsem": longtail_richsem,
    "deformable_detr": deformable_detr,
    "rt_detr": rt_detr,
}


def _memory_gb(field: str) -> float:
    """`VmHWM`, the largest resident set so far, or `VmRSS`, that of now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024 / 1e9
    raise AssertionError(f"/proc/self/status has no {field}")


def timed(
    parts: Mapping[str, tuple[Any, str]], now: Callable[[], float] = time.process_time
) -> dict[str, float]:
    """Put a clock around each part; the seconds add up in what is returned."""
    spent = dict.fromkeys(parts, 0.0)

    def clock(name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            begun = now()
            result = inner(*arguments, **named)
            spent[name] += now() - begun
            return result

        return run

    for name, (owner, attribute) in parts.items():
        setattr(owner, attribute, clock(name, getattr(owner, attribute)))
    return spent


def measure(build: Callable[[Case], Subject], options: argparse.Namespace) -> dict[str, Any]:
    """Run the steps of one subject in this process."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    subject = build(options.case[0])
    subject.model.train()
    spent = timed(subject.parts)
    lower = options.precision == "bfloat16"
    idle, best = _memory_gb("VmRSS"), None
    for repeat in range(options.repeats + 1):
        for name in spent:
            spent[name] = 0.0
        subject.model.zero_grad()
        wall, begun = time.perf_counter(), time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=lower):
            loss = subject.loss()
        middle = time.process_time()
        loss.backward()
        ended = time.process_time()
        step = {
            "step": ended - begun,
            "forward": middle - begun,
            "backward": ended - middle,
            "wall": time.perf_counter() - wall,
            "parts": dict(spent),
        }
        if repeat and (best is None or step["step"] < best["step"]):
            best = step
    assert best is not None
    gradients = [p.grad.norm() for p in subject.model.parameters() if p.grad is not None]
    return best | {
        "memory": _memory_gb("VmHWM"),
        "model": idle,
        "loss": float(loss.detach()),
        "gradient_norm": float(torch.stack(gradients).norm()),
        "parameters": sum(p.numel() for p in subject.model.parameters()),
    }


def _peer(path: str) -> Callable[[Case], Subject]:
    spec = importlib.util.spec_from_file_location("peer", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    build: Callable[[Case], Subject] = module.subject
    return build


def _in_own_process(name: str, case: Case, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", name, "--case", str(case)]
    for option in ("threads", "repeats", "precision", "peer"):
        value = getattr(options, option)
        command += [f"--{option}", str(value)] if value is not None else []
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if ended.returncode:
        raise SystemExit(f"{name} ended with {ended.returncode}; its error stands above")
    result: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return result


def _print_case(case: Case, results: Mapping[str, dict[str, Any]]) -> None:
    base = results.get("longtail")
    print(f"\n{case.height}x{case.width}, batch {case.batch}")
    print(f"{'':18}    step  forward  backward   times    memory   times  parameters")
    for name, result in results.items():
        slower = f"{result['step'] / base['step']:.2f}x" if base else "-"
        larger = f"{result['memory'] / base['memory']:.2f}x" if base else "-"
        print(
            f"{name:18} {result['step']:5.2f} s  {result['forward']:5.2f} s   "
            f"{result['backward']:5.2f} s  {slower:>6}  {result['memory']:5.2f} GB  {larger:>6}  "
            f"{result['parameters'] / 1e6:8.1f} M"
        )
    for name, result in results.items():
        if result["parts"]:
            shares = {part: s / result["step"] for part, s in result["parts"].items()}
            shares["backward"] = result["backward"] / result["step"]
            text = ", ".join(f"{part} {share:.1%}" for part, share in shares.items())
            print(f"share of the step, {name}: {text}")


def main() -> int:
    """Run every subject in every case and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", type=Case.parse, action="append", metavar="HxW:B")
    parser.add_argument("--subjects", default=",".join(SUBJECTS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--peer", metavar="FILE.py")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        build = _peer(options.peer) if options.one == "peer" else SUBJECTS[options.one]
        print(json.dumps(measure(build, options)))
        return 0
    if options.precision == "bfloat16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        print("This processor has no bfloat16 instructions; products in bfloat16 are emulated and")
        print("slower than in float32, so their times would say nothing. Nothing was measured.")
        return 1
    names = [name for name in options.subjects.split(",") if name]
    unknown = sorted(set(names) - set(SUBJECTS))
    if unknown:
        parser.error(f"--subjects knows {', '.join(SUBJECTS)}, not {', '.join(unknown)}")
    names += ["peer"] if options.peer else []
    if importlib.util.find_spec("transformers") is None:
        left_out = [name for name in names if name in ("deformable_detr", "rt_detr")]
        names = [name for name in names if name not in left_out]
        print(f"left out, transformers is not installed: {', '.join(left_out)}")
    print(
        f"training step, {options.precision}, {options.threads} thread(s), "
        f"smallest CPU time of {options.repeats} steps; torch {torch.__version__}"
    )
    for case in options.case or [Case(640, 800, 1), Case(256, 256, 2)]:
        _print_case(case, {name: _in_own_process(name, case, options) for name in names})
    return 0


if __name__ == "__main__":
    sys.exit(main())
