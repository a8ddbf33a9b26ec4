"""The training loop: from the newest checkpoint to the last step, alike on every rank."""

import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.images import decoder_name
from pipeline.data.shards.preparing import load_index, shards_url
from pipeline.data.stream.batches import StepBatches, Stream
from pipeline.data.vocabulary.categories import Vocabulary
from pipeline.detectors.interface import LossContext
from pipeline.errors import LongtailError, StopRequested
from pipeline.progress import Progress as ProgressBar
from pipeline.recipe import Recipe
from pipeline.semantics.soft_labels import SoftLabels
from pipeline.semantics.stored import StoredLabels
from pipeline.signals import stop_signals
from pipeline.training.agreement import (
    StepFacts,
    agree_on_step,
    gather_unreadable,
    on_first_rank,
)
from pipeline.training.ahead import asked_ahead
from pipeline.training.build import build_student
from pipeline.training.checkpoint import (
    DECODER,
    Progress,
    find_source,
    initialize,
    load_state,
    restore,
    save,
)
from pipeline.training.device import worker_device
from pipeline.training.engine import (
    Engine,
    init_process_group,
    num_micro_batches,
    schedule_factor,
)
from pipeline.training.log import LOCK_PATIENCE_S, RunLog, run_lock, write_category_maps
from pipeline.training.manifest import (
    Manifest,
    checkpoint_dir,
    newest_verified,
    read_manifest,
    refuse_another_recipe,
    request_evaluation,
)
from pipeline.training.not_finite import refuse_too_many, report_skipped
from pipeline.training.out_of_memory import memory_explained
from pipeline.training.samples import SampleLog, open_samples
from pipeline.training.step_context import loss_context
from pipeline.training.whereabouts import here
from pipeline.training.window import Window

logger = logging.getLogger(__name__)

CheckIn = Callable[[int, float | None], bool]
"""Told the number of finished steps and the last logged loss; True asks the run to stop."""


@dataclass(frozen=True)
class Run:
    """What a rank holds while it trains. `image_counts` is (C,): training images by column."""

    recipe: Recipe
    vocabulary: Vocabulary
    image_counts: NDArray[np.int64]
    stream: Stream
    engine: Engine
    soft_labels: SoftLabels | None
    samples: SampleLog | None = None


Evaluate = Callable[[], None]
"""Evaluates the checkpoints that wait for it, in line."""
PATIENCE = timedelta(hours=1)
"""How long ranks wait for each other where no watch ends those that hang: this ends them, so it is
no more than the first may need for a save, on a disk that was full too."""
IN_LINE_PATIENCE = timedelta(hours=4)
"""The same where the first rank evaluates while the others wait."""


def train(
    recipe: Recipe,
    device: torch.device,
    check_in: CheckIn,
    evaluate: Evaluate | None = None,
    soft_labels: SoftLabels | None = None,
    patience: timedelta | None = None,
) -> None:
    """Train a stage from its newest checkpoint, or from its beginning, to its last step.

    Every rank of the default process group calls it with the same recipe; shards and teacher are
    there. It saves a checkpoint every `checkpoint_every` steps and after the last one. Each
    `evaluation.every` steps it saves one and marks it as waiting for its evaluation, and the first
    rank calls `evaluate` where it is given. `soft_labels` are a pool's; without it a teacher is
    loaded here. `patience` is how long ranks wait for each other under a watch. When `check_in` of
    any rank is True, all ranks save in the same step and raise `StopRequested`.
    """
    init_process_group(device, patience or patience_without_watch(recipe))
    with ExitStack() as stack:
        stack.enter_context(memory_explained(recipe, dist.get_rank()))
        here.enter("opening the run directory", 0, waits=dist.get_rank() > 0)
        resumed = on_first_rank(lambda: open_run_dir(recipe, stack))
        if resumed is not None and read_manifest(resumed).step >= recipe.training.steps:
            return
        run, progress = start(recipe, device, resumed, soft_labels)
        log = stack.enter_context(RunLog(recipe, progress.step)) if dist.get_rank() == 0 else None
        saved = progress.step if resumed else None
        train_steps(run, progress, log, check_in, evaluate, saved)


def train_steps(
    run: Run,
    progress: Progress,
    log: RunLog | None,
    check_in: CheckIn,
    evaluate: Evaluate | None,
    saved: int | None,
) -> None:
    """The steps that are left, with their checkpoints and evaluations; see `train`.

    `saved` is the step that a checkpoint is there of, None where there is none.
    """
    recipe, section = run.recipe, run.recipe.training
    held = 0 if run.soft_labels is None else run.soft_labels.batches_ahead
    steps = asked_ahead(run.stream.iterate(progress.step, section.steps, held), run.soft_labels)
    loss, window = None, Window()
    while progress.step < section.steps:
        here.enter("data", progress.step)
        with window.timed("data_wait"):
            batches, failure = next_batches(steps)
        here.enter("agreement", waits=True)
        facts = agree_on_step(
            batches,
            failure,
            check_in(progress.step, loss),
            run.vocabulary.num_categories,
            run.engine.device,
            len(run.stream.ledger.unshared),
            coarse_boxes=recipe.detector.losses.image_level == "boxes",
            semantics="none" if recipe.semantic is None else recipe.semantic.labels,
        )
        if facts.unshared:
            share_unreadable(run, progress, log)
        if facts.stop or batches is None:
            if saved != progress.step:
                log_window(run, progress, window, log)
                save_checkpoint(run, progress)
            raise StopRequested(
                f"stopped after step {progress.step} of {section.steps} and saved in "
                f"{recipe.run_dir}; the same command goes on from there"
            )
        take_step(run, progress, batches, facts, window, log)
        done = progress.step == section.steps
        waits = not done and is_evaluated_live(recipe, progress.step)
        saves = done or waits or progress.step % section.checkpoint_every == 0
        if saves or progress.step % section.log_every == 0:
            # With each checkpoint too, so that a resumed run's lines leave no step out.
            loss = log_window(run, progress, window, log)
        if saves:
            with window.timed("checkpoint_wait"):
                save_checkpoint(run, progress, wait_for_evaluation=waits)
            saved = progress.step
        if waits and evaluate is not None:
            with window.timed("evaluation_wait"):
                on_first_rank(evaluate)
    check_in(progress.step, loss)


def take_step(
    run: Run,
    progress: Progress,
    batches: StepBatches,
    facts: StepFacts,
    window: Window,
    log: RunLog | None,
) -> None:
    """One step with what all ranks know of it, counted; skipped where it is not finite."""
    recipe = run.recipe
    context = loss_context(
        facts,
        run.image_counts,
        recipe.detector.losses,
        recipe.seed,
        progress.step,
        run.engine.device,
    )
    suspects = run_step(run, batches, context, window)
    progress.step += 1
    count_consumed(progress, batches, facts.labelled, run.vocabulary)
    if suspects is not None:
        progress.skipped_steps += 1
        named, path = report_skipped(
            recipe.run_dir, progress.step, suspects, batches.micro_batches, log
        )
        refuse_too_many(progress.skipped_steps, recipe.training.max_skipped_steps, named, path)


def is_evaluated_live(recipe: Recipe, step: int) -> bool:
    """Whether the recipe asks for an evaluation after `step` steps, while training goes on."""
    every = recipe.evaluation.every
    return recipe.data.validation is not None and every > 0 and step % every == 0


def log_window(run: Run, progress: Progress, window: Window, log: RunLog | None) -> float | None:
    """Log what the steps since the last line gave, if any; the mean loss. All ranks call it."""
    if not window.steps:
        return None
    section = run.recipe.training
    rate = section.learning_rate * schedule_factor(progress.step - 1, section)
    values = window.values(section, rate, run.engine.device)
    if log is not None:
        lengths = run.stream.plan.epoch_lengths
        epochs = {name: number / lengths[name] for name, number in progress.samples.items()}
        seen = {"consumed": progress.consumed(), "epochs": epochs}
        log.write("step", progress.step, values | seen)
    loss: float | None = values["loss"]
    return loss


def open_run_dir(recipe: Recipe, stack: ExitStack) -> Path | None:
    """Take the run directory for this process until `stack` closes; the checkpoint to go on from.

    Raises `RecipeError` when the run was started by another recipe.
    """
    # Who waits for it for too long is not to be ended as one that hangs.
    most = (recipe.cluster.hang_timeout or math.inf) / 2
    stack.enter_context(run_lock(recipe.run_dir, min(LOCK_PATIENCE_S, most)))
    directory = newest_verified(recipe.run_dir)
    if directory is not None:
        refuse_another_recipe(directory, recipe)
    return directory


def start(
    recipe: Recipe,
    device: torch.device,
    resumed: Path | None,
    soft_labels: SoftLabels | None = None,
) -> tuple[Run, Progress]:
    """Everything that a rank needs, with the weights and moments of `resumed` where it is given,
    else with the first weights of the recipe."""
    here.enter("loading indexes")
    data, section = recipe.data, recipe.training
    sources = {s.name: s for s in (*data.train, *data.extra, data.vocabulary_source)}
    indexes = {name: load_index(shards_url(data, source)) for name, source in sources.items()}
    counted = indexes[data.vocabulary_source.name]
    vocabulary, world_size = counted.vocabulary, dist.get_world_size()
    stream = Stream(
        data,
        section,
        indexes,
        vocabulary,
        seed=recipe.seed,
        rank=dist.get_rank(),
        world_size=world_size,
    )
    if dist.get_rank() == 0:
        write_category_maps(recipe.run_dir, stream.category_maps)
    here.enter("building the model")
    student, soft_labels = build_student(
        recipe, vocabulary, device, pretrained=resumed is None, soft_labels=soft_labels
    )
    if isinstance(soft_labels, StoredLabels):
        stream.leave_out(soft_labels.unlabelled())
    progress, state = Progress(0, 0, stream.plan.state()), None
    if resumed is not None:
        manifest = read_manifest(resumed)
        here.enter("loading the checkpoint")
        stream.plan.check(manifest.plan)
        state = load_state(resumed)
        restore(student, state, resumed, vocabulary)
        progress.step, progress.skipped_steps = manifest.step, manifest.skipped_steps
        progress.samples.update(manifest.consumed["samples"])
        progress.instances.update(manifest.consumed["instances"])
        stream.ledger.merge(manifest.unreadable)
        warn_of_another_decoder(manifest)
        if dist.get_rank() == 0:
            logger.info("going on from %s", resumed)
    elif recipe.initialize_from is not None:
        source = on_first_rank(lambda: find_source(recipe))
        report = initialize(student.detector, source, vocabulary)
        if dist.get_rank() == 0:
            logger.info("%s", report)
    here.enter("preparing the optimizer")
    accumulation = num_micro_batches(section.batch_size, section.micro_batch, world_size)
    engine = Engine(student, section, accumulation, state)
    counts = counted.image_counts()
    image_counts = np.array([counts[number] for number in vocabulary.ids], dtype=np.int64)
    samples = open_samples(recipe.run_dir, progress.step) if recipe.logging.samples else None
    return Run(recipe, vocabulary, image_counts, stream, engine, soft_labels, samples), progress


def warn_of_another_decoder(manifest: Manifest) -> None:
    """Say so, on the first rank, when images are decoded by another program than before."""
    before, now = manifest.versions.get(DECODER), decoder_name()
    if before is not None and before != now and dist.get_rank() == 0:
        logger.warning(
            "images were decoded by %s up to step %d and are now by %s: pixels may differ by a "
            "level here and there, so the run does not go on bit by bit",
            before,
            manifest.step,
            now,
        )


def next_batches(
    steps: Iterator[StepBatches],
) -> tuple[StepBatches | None, LongtailError | None]:
    """The next step's batches, or why they cannot be had, for all ranks to learn."""
    try:
        return next(steps), None
    except LongtailError as error:
        return None, error


def run_step(
    run: Run, batches: StepBatches, context: LossContext, window: Window
) -> list[str] | None:
    """Forward and backward of each micro-batch, then one update.

    None when the weights were updated; else, since a loss or gradient of some rank is not finite,
    the samples of this rank's micro-batches with such a loss.
    """
    engine = run.engine
    assert len(batches.micro_batches) == engine.accumulation
    # Only dropout draws from it. It follows from the step, so a restart changes nothing.
    entropy = [run.recipe.seed, batches.step, dist.get_rank()]
    torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
    sums: dict[str, Tensor] = {}
    totals = []
    for batch in batches.micro_batches:
        batch = batch.to(engine.device)
        soft_labels = None
        if run.soft_labels is not None:
            here.enter("teacher")
            with window.timed("teacher_wait"):
                soft_labels = run.soft_labels.labels(batch)
        here.enter("forward")
        losses = engine.forward(batch.images, batch.mask, batch.targets, context, soft_labels)
        here.enter("backward")
        totals.append(engine.backward(losses))
        for name, loss in losses.items():
            sums[name] = sums[name] + loss.detach() if name in sums else loss.detach()
    here.enter("step")
    norm = engine.step(batches.step)
    window.add(batches, sums, norm)
    if run.samples is not None:
        run.samples.write(batches.step + 1, batches.micro_batches, totals)
    if math.isfinite(norm):
        return None
    spoilt = [b for b, t in zip(batches.micro_batches, totals, strict=True) if not t.isfinite()]
    return [sample for batch in spoilt for sample in batch.sample_ids]


def share_unreadable(run: Run, progress: Progress, log: RunLog | None) -> None:
    """Enter what each rank could not read into the ledgers of all, and into the log.

    Raises `DataError`, on all ranks, when the run has met more than its budget.
    """
    found = gather_unreadable(run.stream.ledger.unshared)
    if log is not None:
        log.write("unreadable", progress.step, {"images": found})
    run.stream.ledger.merge(found)


def count_consumed(
    progress: Progress, batches: StepBatches, labelled: NDArray[np.int64], vocabulary: Vocabulary
) -> None:
    """Add a step's samples and, by frequency group, its `labelled` (C,) boxes."""
    progress.samples.update(batches.sources)
    groups = np.array([frequency or "" for frequency in vocabulary.frequencies])
    for group in "rcf":
        progress.instances[group] += int(labelled[groups == group].sum())


def save_checkpoint(run: Run, progress: Progress, *, wait_for_evaluation: bool = False) -> None:
    """Gather the state from all ranks and publish it on the first."""
    here.enter("gathering the checkpoint", progress.step)
    state, world_size = run.engine.state(), dist.get_world_size()
    progress.unreadable = dict(run.stream.ledger.unreadable)

    def publish() -> None:
        assert state is not None
        if wait_for_evaluation:
            # First, so that a kill in between leaves no checkpoint that nobody evaluates.
            request_evaluation(checkpoint_dir(run.recipe.run_dir, progress.step))
        save(state, progress, run.recipe, run.vocabulary, world_size)

    here.enter("writing the checkpoint", waits=dist.get_rank() > 0)
    on_first_rank(publish)


def train_here(recipe: Recipe, evaluate: Evaluate | None = None) -> None:
    """Train in this process: as one of torchrun's workers, or alone, without Ray.

    `evaluate` is called in line, see `train`. SIGTERM and SIGINT save a checkpoint and raise
    `StopRequested`; a second one kills.
    """
    device = worker_device(recipe)
    torch.set_num_threads(max(1, int(recipe.cluster.cpus_per_worker)))
    with ExitStack() as stack:
        stop = stack.enter_context(stop_signals())
        join_process_group(device, patience_without_watch(recipe))
        first = dist.get_rank() == 0
        shown = stack.enter_context(ProgressBar(f"train {recipe.name}", "steps")) if first else None

        def check_in(step: int, loss: float | None) -> bool:
            if shown is not None:
                note = "" if loss is None else f"loss {loss:.4g}"
                shown.update(step, recipe.training.steps, note)
            return stop.is_set()

        train(recipe, device, check_in, evaluate)


def patience_without_watch(recipe: Recipe) -> timedelta:
    """How long a rank waits for another under torchrun."""
    return IN_LINE_PATIENCE if recipe.evaluation.every else PATIENCE


def join_process_group(device: torch.device, timeout: timedelta = PATIENCE) -> None:
    """Join torchrun's process group, or make one of this process alone, where there is none yet.

    `timeout` is for the longest that a rank waits for another. The group lives as long as the
    process: DeepSpeed keeps hold of the first one that it sees.
    """
    if dist.is_initialized():
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
