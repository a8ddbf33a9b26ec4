"""`longtail check R --workers N`: memory, time, data and GPU-hours of a run, before it is paid for.

Memory is counted (`activations.py`, `ranks.py`); time is measured or unknown; data come from the
indexes of prepared sources. docs/scale.md has the method and how far off it was.
"""

from collections.abc import Mapping
from typing import NamedTuple

from pipeline.check.describe import plan_of, worst_canvas
from pipeline.check.needs import needs_teacher, sources_of
from pipeline.check.pace import StepTime, reads_of, step_time
from pipeline.check.prepared import find_data, vocabulary_of
from pipeline.check.ranks import LAYOUTS, Layout, ModelSize, RankMemory, Training, rank_memory
from pipeline.check.reserved import cluster_line, host_lines, reserved_gpus
from pipeline.data.plan.steps import Plan
from pipeline.data.shards.index import Index
from pipeline.data.vocabulary.categories import Vocabulary
from pipeline.errors import RecipeError
from pipeline.recipe import Recipe

PUBLISHED = {"lvis": 1203, "objects365": 365, "coco": 80, "voc": 20, "openimages": 601}
"""Categories of data sets that are not here to be counted."""
MARGIN = 0.15
"""Of a GPU's memory, for what is not predicted: CUDA's context, communicators, workspaces of
kernels, and an allocator's gaps. It is an assumption and was not measured."""


class Asked(NamedTuple):
    """The options of `longtail check`: None where they are not given."""

    workers: int | None = None
    gpu_memory: float | None = None
    step_seconds: float | None = None

    def refuse(self) -> None:
        """Raises `RecipeError` for options that are no such amounts."""
        for name, value in zip(self._fields, self, strict=True):
            if value is not None and not 0 < value < float("inf"):
                option = f"--{name.replace('_', '-')}"
                raise RecipeError(f"{option} is {value:g}, and has to be a number above 0")


class Prediction(NamedTuple):
    """Of one recipe: `text` to print, and why it cannot run as it is, or None."""

    text: str
    refusal: str | None


def predict_stage(recipe: Recipe, asked: Asked) -> Prediction:
    """What a recipe would need on `asked.workers` workers, or on those that it names.

    Its data need not be here, and neither do the GPUs. Raises `RecipeError` for options that are no
    such amounts, and for a model that cannot be built.
    """
    asked.refuse()
    workers = asked.workers or recipe.cluster.max_workers
    indexes, vocabulary = _known(recipe)
    if vocabulary is not None:
        categories, counted = vocabulary.num_categories, ""
    else:
        categories, counted = _published(recipe), ", as published: its data are not here"
    memory, lines = predicted_memory(recipe, workers, categories)
    lines[0] += counted
    time = step_time(recipe, workers, asked.step_seconds)
    plan = plan_of(recipe, indexes, vocabulary)
    lines[3:3] = _table(memory, asked.gpu_memory)
    lines += run_lines(recipe, workers, time)
    lines += data_lines(recipe, plan, indexes, time, workers)
    return Prediction("\n".join(lines), refusal(recipe, workers, memory, asked.gpu_memory))


def _known(recipe: Recipe) -> tuple[dict[str, Index | None], Vocabulary | None]:
    """Indexes of what is prepared, and the categories where anything here tells them."""
    indexes: dict[str, Index | None] = {}
    for source in sources_of(recipe):
        try:
            indexes[source.name] = find_data(recipe, source)
        except RecipeError:  # Neither shards nor raw data: the run is to be somewhere else.
            indexes[source.name] = None
    return indexes, vocabulary_of(recipe, indexes)


def _published(recipe: Recipe) -> int:
    source = recipe.data.vocabulary_source
    if source.format not in PUBLISHED:
        raise RecipeError(
            f"recipe {recipe.name}: the number of categories of source {source.name} "
            f"({source.format}) is not known before its data are here; prepare it, or set data.root"
        )
    return PUBLISHED[source.format]


class _Batches(NamedTuple):
    """`images` of one worker in a step, in `micro_steps` of at most `micro_batch`."""

    images: int
    micro_steps: int
    micro_batch: int


def _batches(recipe: Recipe, workers: int) -> _Batches:
    section = recipe.training
    if workers > section.batch_size:
        raise RecipeError(
            f"recipe {recipe.name}: {workers} workers are more than the {section.batch_size} "
            "images of training.batch_size, so some would have none; take fewer workers, or raise "
            "training.batch_size with its learning rate"
        )
    images = -(-section.batch_size // workers)
    micro_steps = -(-images // section.micro_batch)
    return _Batches(images, micro_steps, -(-images // micro_steps))


def _padding(recipe: Recipe, workers: int, share: _Batches) -> str:
    """What of a step is computed for nothing, where images do not come out even."""
    places, images = workers * share.micro_steps * share.micro_batch, recipe.training.batch_size
    if places == images:
        return ""
    text = f"; {places - images} of {places} places are padding of weight 0"
    if images % workers:
        text += ", and only a cluster.workers of [least, most] may be one that does not divide"
    return text


def layout_of(recipe: Recipe) -> Layout:
    """How the recipe itself would train."""
    return Layout(recipe.training.zero_stage, recipe.training.offload)


def predicted_memory(
    recipe: Recipe, workers: int, categories: int
) -> tuple[dict[Layout, RankMemory], list[str]]:
    """Memory of a worker at worst, by layout; three lines on the micro-batch that it is for, and
    those on hosts. Raises `RecipeError` for more workers than images."""
    from pipeline.check.activations import MicroBatch, meta_student, step_bytes

    section, data = recipe.training, recipe.data
    share = _batches(recipe, workers)
    height, width = worst_canvas(recipe, share.micro_batch)
    drawn = recipe.detector.losses.federated_categories
    columns = drawn + section.batch_size * data.max_boxes if drawn else categories
    batch = MicroBatch(share.micro_batch, height, width, data.max_boxes, min(columns, categories))
    student = meta_student(recipe, categories)
    size = ModelSize.of(student)
    on_gpu = recipe.cluster.gpus_per_worker > 0
    activations = step_bytes(student, batch, on_gpu=on_gpu)
    teacher = (0, 0)
    if needs_teacher(recipe):
        from pipeline.check.teacher import teacher_bytes

        teacher = teacher_bytes(recipe, batch)
    training = Training(
        workers, share.micro_steps, section.ema_decay > 0, on_gpu, activations.peak, *teacher
    )
    lines = [
        f"{recipe.name} on {workers} workers, predicted: {size.parameters / 1e6:.1f} M parameters, "
        f"{size.trained / 1e6:.1f} M of them trained; {categories} categories",
        f"  batch       {section.batch_size} images = {workers} workers x {share.images}, in "
        f"{share.micro_steps} micro-steps of {share.micro_batch}{_padding(recipe, workers, share)}",
        f"  at worst    {height}x{width} pixels, {data.max_boxes} boxes an image, {batch.columns} "
        f"class columns; {section.precision}",
        *host_lines(recipe, size, share.micro_steps),
    ]
    layouts = dict.fromkeys((*LAYOUTS, layout_of(recipe)))
    return {layout: rank_memory(layout, size, training) for layout in layouts}, lines


def _table(memory: Mapping[Layout, RankMemory], gpu_memory: float | None) -> list[str]:
    """A line for each part of the memory, a column for each layout, in GB."""

    def line(name: str, cells: list[str]) -> str:
        return f"  {name:28}" + "".join(f"{cell:>17}" for cell in cells)

    def numbers(name: str, values: list[int]) -> str:
        return line(name, [f"{value / 1e9:.2f}" for value in values])

    every = list(memory.values())
    lines = [
        line("GB of each worker", [f"ZeRO {layout}" for layout in memory]),
        numbers("parameters and buffers", [m.parameters for m in every]),
        numbers("gradients", [m.gradients for m in every]),
        numbers("AdamW's moments", [m.moments for m in every]),
        numbers("averaged weights", [m.averages for m in every]),
        numbers("copies, buckets, gathered", [m.copies for m in every]),
        numbers("activations", [m.working for m in every]),
        numbers("teacher", [m.teacher for m in every]),
        numbers("in all", [m.total for m in every]),
    ]
    if gpu_memory is not None:
        verdicts = [verdict(m.total, gpu_memory) for m in every]
        lines.append(line(f"of {gpu_memory:g} GB", verdicts))
    lines.append(numbers("on the host", [m.host for m in every]))
    lines.append(numbers("received in a step", [m.received for m in every]))
    return lines


def verdict(num_bytes: int, gpu_memory: float) -> str:
    """`fits`, `tight` where less than the margin is left, or `too much`."""
    if num_bytes > gpu_memory * 1e9:
        return "too much"
    return "fits" if num_bytes <= (1 - MARGIN) * gpu_memory * 1e9 else "tight"


def run_lines(recipe: Recipe, workers: int, time: StepTime) -> list[str]:
    """What the cluster must have, step time, time of the run, GPU-hours."""
    steps, cluster = recipe.training.steps, cluster_line(recipe, workers)
    if time.seconds is None:
        return [
            cluster,
            f"  step time   unknown: {time.origin}",
            f"  run         {steps:,} steps; time and GPU-hours unknown",
        ]
    hours = steps * time.seconds / 3600
    gpus = reserved_gpus(recipe, workers).total
    cost = f"{hours * gpus:,.1f} GPU-hours" if gpus else f"{hours * workers:,.1f} worker-hours"
    return [
        cluster,
        f"  step time   {time.seconds:g} s ({time.origin}): "
        f"{recipe.training.batch_size / time.seconds:.1f} images a second",
        f"  run         {steps:,} steps in {hours:,.2f} hours without evaluation; {cost}",
    ]


def data_lines(
    recipe: Recipe,
    plan: Plan | None,
    indexes: Mapping[str, Index | None],
    time: StepTime,
    workers: int,
) -> list[str]:
    """Epochs, and what storage has to deliver."""
    if plan is None:
        used = [source.name for source in (*recipe.data.train, *recipe.data.extra)]
        absent = ", ".join(name for name in used if indexes[name] is None)
        return [f"  data        epochs and rate unknown; not prepared here: {absent}"]
    steps = recipe.training.steps
    reads = reads_of(plan, indexes, steps, recipe.data.reading)
    lines = []
    for name, number in plan.samples_before(steps).items():
        epochs = number / plan.epoch_lengths[name]
        text = f"  epochs      {epochs:.2f} of {name}"
        if time.seconds is not None and epochs:
            text += f", {steps * time.seconds / 3600 / epochs:.2f} hours each"
        lines.append(text)
    lines.append(
        f"  data        {reads.num_bytes / 1e9:,.2f} GB in {reads.images:,.0f} samples; "
        f"{reads.num_bytes / steps / 1e6:.2f} MB a step, at most {reads.bytes_of_step / 1e6:.2f}"
    )
    if reads.of_machine is not None:
        # What workers read is then on their machine's disk.
        text = f"; fetched as whole shards: {reads.of_machine / 1e9:,.2f} GB by each machine"
        if time.seconds is not None:
            rate = reads.of_machine / (steps * time.seconds) / 1e6
            text += f", so storage has to give {rate:.2f} MB/s to each"
        lines[-1] += text
    elif time.seconds is not None:
        rate = reads.bytes_of_step / time.seconds / 1e6
        lines[-1] += f": storage has to give {rate:.2f} MB/s, {rate / workers:.3f} to each worker"
    return lines


def refusal(
    recipe: Recipe, workers: int, memory: Mapping[Layout, RankMemory], gpu_memory: float | None
) -> str | None:
    """Why the recipe's own layout does not fit, and which would."""
    own = layout_of(recipe)
    if gpu_memory is None or verdict(memory[own].total, gpu_memory) != "too much":
        return None
    able = [each for each, m in memory.items() if verdict(m.total, gpu_memory) != "too much"]
    better = "no stage fits"
    if able:
        offload = f" with training.offload {able[0].offload}" if able[0].offload != "none" else ""
        better = f"ZeRO {able[0].zero_stage}{offload} would fit"
    here = f"training.zero_stage {own.zero_stage}"
    if own.offload != "none":
        here += f", training.offload {own.offload}"
    return (
        f"recipe {recipe.name} does not fit: {memory[own].total / 1e9:.1f} GB are predicted for "
        f"each of {workers} workers at {here}, and --gpu-memory is "
        f"{gpu_memory:g}; {better}. Less memory take a smaller training.micro_batch, "
        "training.activation_checkpointing, detector.backbone.checkpointed_stages, precision "
        "bfloat16, and smaller data.transforms"
    )
