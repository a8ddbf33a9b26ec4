"""Where soft labels are made: what each way costs the student's step, side by side in one run.

    python benchmarks/teacher.py [--case 256x256:2] [--rounds 8] [--steps 3] [--threads 1]
                                 [--ways none,ready,...] [--device cuda] [--weights FILE]

The student is RichSem's, a ResNet-50 DINO with 900 queries and 1203 categories, and the teacher a
CLIP ResNet-50; both have random weights unless `--weights` names the teacher's. A step is reading
labels, forward, backward and AdamW, on images of its own with 13 boxes each. The ways take turns:
in each round each of them makes one step that is not counted and then `--steps` that are. What is
said of a way is the median over all rounds, of wall time (`step`) and of the CPU time of the
student's process (`cpu`, which other work on the machine moves less); `ratio` is to `none`, in each
round, and again the median.

none          no teacher and no semantic branch
ready         the branch, with soft labels that lie in memory: what the branch itself costs
in_process    the teacher in the student's process
pool          the teacher in a Ray actor that works on the next `--ahead` batches
pool_given    the same, but the actor has the regions' features and only compares them with the text
              rows: what is left is the way there and back
stored        exact labels from files as `longtail prepare --soft-labels` writes
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from step import NUM_BOXES, NUM_CATEGORIES, TEXT_DIM, Case, draw
from torch import Tensor

from pipeline.data.batch import Batch, Targets
from pipeline.data.stream.batches import StepBatches
from pipeline.data.transforms import origins
from pipeline.detectors import build_detector
from pipeline.detectors.interface import LossContext
from pipeline.recipe import Cluster, DetectorSection, Semantic
from pipeline.recipe import Teacher as TeacherSection
from pipeline.semantics.branch import SemanticBranch
from pipeline.semantics.soft_labels import InProcess, SoftLabels
from pipeline.training.ahead import asked_ahead
from pipeline.training.student import Student

TEMPERATURE = 100.0


@dataclass(frozen=True)
class Seconds:
    """Of one step: by the clock, of the process's CPUs, and of waiting for soft labels."""

    wall: float
    cpu: float
    wait: float


class Given:
    """In the place of a teacher: features of regions that are there already, and text rows."""

    temperature = TEMPERATURE

    def __init__(self, number: int) -> None:
        self._features, self._text = unit_rows(number, seed=3), unit_rows(NUM_CATEGORIES, seed=2)

    def soft_labels(self, batch: Batch) -> list[Tensor]:
        rows = (TEMPERATURE * self._features @ self._text.T).softmax(dim=-1)
        return list(rows.split([len(target.boxes) for target in batch.targets]))


class Ready:
    """Soft labels that lie in memory."""

    temperature = TEMPERATURE
    batches_ahead = 0

    def __init__(self, number: int, device: str) -> None:
        self._rows = unit_rows(number, seed=3) @ unit_rows(NUM_CATEGORIES, seed=2).T
        self._rows = (TEMPERATURE * self._rows).softmax(dim=-1).to(device)

    def ask(self, batch: Batch) -> None:
        """Nothing: they are there."""

    def labels(self, batch: Batch) -> list[Tensor]:
        return list(self._rows.split([len(target.boxes) for target in batch.targets]))


def unit_rows(number: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(number, TEXT_DIM, generator=generator), dim=-1)


def make_teacher(weights: str, device: str) -> Any:
    """The CLIP ResNet-50, in whichever process."""
    from pipeline.semantics.teacher import Teacher

    section = TeacherSection(model="RN50", pretrained=weights, prompts="single")
    return Teacher(section, unit_rows(NUM_CATEGORIES, seed=2), None, device)


def make_given(number: int) -> Given:
    """What `pool_given` has in its actor."""
    return Given(number)


class Student50:
    """The student with its optimizer; `step` trains on one batch."""

    def __init__(self, case: Case, device: str) -> None:
        text = unit_rows(NUM_CATEGORIES, seed=2)
        section = DetectorSection.model_validate({"backbone": {"weights": None}})
        detector = build_detector(section, num_categories=NUM_CATEGORIES, text_embeddings=text)
        self._branch = SemanticBranch(detector.feature_dim, text, TEMPERATURE)
        self._model = Student(detector, self._branch, Semantic()).to(device)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-6)
        drawn = draw(case)
        sampled = torch.randperm(NUM_CATEGORIES, generator=torch.Generator().manual_seed(4))[:50]
        columns = torch.cat([sampled, drawn.labels.flatten()]).unique().to(device)
        self._context = LossContext(float(NUM_BOXES * case.batch), columns)
        self._device = device

    def step(self, batch: Batch, source: SoftLabels | None) -> float:
        """One update; the seconds that it waited for soft labels."""
        self._model.branch = None if source is None else self._branch
        self._model.semantic = None if source is None else Semantic()
        batch, soft, begun = batch.to(self._device), None, time.perf_counter()
        if source is not None:
            soft = source.labels(batch)
        waited = time.perf_counter() - begun
        losses = self._model(batch.images, batch.mask, batch.targets, self._context, soft)
        torch.stack(list(losses.values())).sum().backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self._device == "cuda":
            torch.cuda.synchronize()
        return waited


def batches_of(case: Case, number: int, seed: int) -> Iterator[StepBatches]:
    """Steps of one micro-batch with pixels of their own, interleaved as the stream gives them."""
    generator, drawn = torch.Generator().manual_seed(seed), draw(case)
    size = case.height, case.width
    mask = torch.zeros((case.batch, *size), dtype=torch.bool)
    targets = [
        Targets(boxes, labels, i, size, size, seed=i, origin=origins(i, NUM_BOXES))
        for i, (boxes, labels) in enumerate(zip(drawn.boxes, drawn.labels, strict=True))
    ]
    for step in range(number):
        pixels = torch.randint(256, (case.batch, *size, 3), dtype=torch.uint8, generator=generator)
        names = [f"drawn/{seed}.{step}.{i}" for i in range(case.batch)]
        batch = Batch(pixels.permute(0, 3, 1, 2), mask, targets, ["drawn"] * case.batch, names)
        yield StepBatches(step, [batch], "train", {"drawn": case.batch})


def measure(
    student: Student50, case: Case, source: SoftLabels | None, steps: int, seed: int
) -> list[Seconds]:
    """`steps` steps after one that is not counted; leaves nothing under way."""
    ahead = 0 if source is None else source.batches_ahead
    number = 1 + steps + ahead
    made = list(batches_of(case, number, seed))
    coming = asked_ahead(iter(made), source)
    found = []
    for i in range(number):
        wall, cpu = time.perf_counter(), time.process_time()
        [batch] = next(coming).micro_batches
        if i > steps:
            # Asked for while the others were trained on; only their actor still has to end.
            assert source is not None
            source.labels(batch)
            continue
        wait = student.step(batch, source)
        seconds = Seconds(time.perf_counter() - wall, time.process_time() - cpu, wait)
        if i > 0:
            found.append(seconds)
    return found


def open_ways(
    names: list[str], case: Case, options: argparse.Namespace, stack: ExitStack
) -> dict[str, SoftLabels | None]:
    """The source of soft labels of each way; actors end with `stack`."""
    number = NUM_BOXES * case.batch

    def teacher() -> Callable[[], Any]:
        weights = options.weights or str(random_weights(stack))
        return partial(make_teacher, weights, options.device)

    ways: dict[str, Callable[[], SoftLabels | None]] = {
        "none": lambda: None,
        "ready": lambda: Ready(number, options.device),
        "in_process": lambda: InProcess(teacher()(), None),
        "pool": lambda: open_pool(teacher(), options, stack),
        "pool_given": lambda: open_pool(partial(make_given, number), options, stack),
        "stored": lambda: open_stored(case, stack),
    }
    unknown = sorted(set(names) - ways.keys())
    if unknown:
        sys.exit(f"unknown ways {', '.join(unknown)}; there are {', '.join(ways)}")
    return {name: ways[name]() for name in names}


def open_pool(make: Callable[[], Any], options: argparse.Namespace, stack: ExitStack) -> SoftLabels:
    """A pool of one actor."""
    from pipeline.cluster import start_ray, stop_ray
    from pipeline.cluster.teacher_actor import start_actors
    from pipeline.cluster.teacher_pool import TeacherPool

    start_ray(Cluster(gpus_per_worker=0))
    stack.callback(stop_ray)
    gpus = 0.5 if options.device == "cuda" else 0
    section = TeacherSection.model_validate(
        {"model": "RN50", "pretrained": "unused", "placement": "pool", "gpus_per_actor": gpus}
    )
    pool = TeacherPool(start_actors(section, make), options.ahead)
    assert pool.temperature > 0, "the actor is there"
    return pool


def open_stored(case: Case, stack: ExitStack) -> SoftLabels:
    """Exact labels of the batch's boxes in one file, as of a shard with as many images."""
    from pipeline.semantics.sparse import SparseLabels
    from pipeline.semantics.stored import (
        Header,
        StoredLabels,
        StoredSource,
        file_url,
        write_header,
        write_labels,
    )

    folder = stack.enter_context(tempfile.TemporaryDirectory())
    rows = Given(NUM_BOXES * case.batch).soft_labels(next(batches_of(case, 1, 0)).micro_batches[0])
    labels = SparseLabels.of(torch.cat(rows), None)
    write_labels(file_url(folder, 0), [NUM_BOXES] * case.batch, labels)
    header = Header(
        identity={"top_k": None},
        temperature=TEMPERATURE,
        num_categories=NUM_CATEGORIES,
        num_boxes=len(labels),
        num_images=case.batch,
        skipped=0,
        rest=(0.0, 0.0),
        num_bytes=labels.num_bytes,
    )
    write_header(folder, header)
    index: Any = SimpleNamespace(url=folder, shard=np.zeros(case.batch, dtype=np.int32))
    return StoredLabels({"drawn": StoredSource(index, folder)})


def random_weights(stack: ExitStack) -> Path:
    """A CLIP ResNet-50 that has seen nothing: it takes as long as any other."""
    from safetensors.torch import save_file

    from pipeline.semantics.clip import new_clip

    torch.manual_seed(0)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    save_file(new_clip("RN50").state_dict(), folder / "rn50.safetensors")
    return folder / "rn50.safetensors"


def print_table(case: Case, found: dict[str, list[list[Seconds]]]) -> None:
    """Medians of each way, and of its rounds' ratios to `none` (or to the first way)."""
    first = "none" if "none" in found else next(iter(found))
    print(f"\n{case.height}x{case.width}, batch {case.batch}; times in seconds")
    print(f"{'':12}{'step':>8}{'ratio':>8}{'cpu':>8}{'ratio':>8}{'teacher wait':>14}")
    for name, rounds in found.items():
        steps = [step for round_ in rounds for step in round_]
        row = f"{name:12}"
        for kind in ("wall", "cpu"):
            ratios = [
                _median(mine, kind) / _median(other, kind)
                for mine, other in zip(rounds, found[first], strict=True)
            ]
            row += f"{_median(steps, kind):8.3f}{statistics.median(ratios):8.3f}"
        print(row + f"{_median(steps, 'wait'):14.4f}")


def _median(steps: list[Seconds], kind: str) -> float:
    return statistics.median(getattr(step, kind) for step in steps)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", type=Case.parse, default=Case(256, 256, 2))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--ahead", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ways", default="none,ready,in_process,pool,pool_given,stored")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--weights", help="of the teacher, a .pt or .safetensors file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    case, names = options.case, options.ways.split(",")
    with ExitStack() as stack:
        ways = open_ways(names, case, options, stack)
        torch.manual_seed(0)
        student = Student50(case, options.device)
        found: dict[str, list[list[Seconds]]] = defaultdict(list)
        for round_ in range(options.rounds):
            # Each way has each place in the order, so that none is always after the same one.
            order = names[round_ % len(names) :] + names[: round_ % len(names)]
            for name in order:
                found[name].append(measure(student, case, ways[name], options.steps, round_))
            newest = (f"{name} {_median(found[name][-1], 'wall'):.2f} s" for name in names)
            print(f"round {round_ + 1}: {', '.join(newest)}", file=sys.stderr, flush=True)
        print(
            f"{options.device}, {options.threads} thread(s), {options.rounds} rounds of "
            f"{options.steps} steps, {options.ahead} ahead; torch {torch.__version__}"
        )
        print_table(case, {name: found[name] for name in names})
    return 0


if __name__ == "__main__":
    sys.exit(main())
