"""Steps whose loss or gradient is not finite: left out, written down, and not too many of them."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from pipeline.data.batch import Batch
from pipeline.errors import RecipeError
from pipeline.training.agreement import gather_strings, on_first_rank
from pipeline.training.log import RunLog
from pipeline.training.manifest import write_atomically

logger = logging.getLogger(__name__)

FOLDER = "not_finite"
"""Of a run directory; it has a file for each step that was left out."""
_SHOWN = 8


def report_skipped(
    run_dir: Path,
    step: int,
    suspects: Sequence[str],
    batches: Sequence[Batch],
    log: RunLog | None,
) -> tuple[str, Path]:
    """Write down the samples of a step that was left out; some of them in words, and the file.

    All ranks call it, each with its own micro-batches and with those samples of them whose loss is
    not finite.
    """
    found = gather_strings(suspects)
    batch = gather_strings([sample for one in batches for sample in one.sample_ids])
    path = run_dir / FOLDER / f"step_{step:08d}.json"
    tree = {"step": step, "loss_not_finite": found, "batch": batch}
    on_first_rank(lambda: write_atomically(path, json.dumps(tree, indent=1)))
    cause = "by their loss" if found else "by a gradient, so any of the batch"
    chosen = found or batch
    more = f" and {len(chosen) - _SHOWN} more" if len(chosen) > _SHOWN else ""
    named = f"{', '.join(chosen[:_SHOWN])}{more} ({cause})"
    if log is not None:
        log.write("skipped", step, {"sample_ids": found})
        logger.warning("step %d is left out, for it is not finite: %s; see %s", step, named, path)
    return named, path


def refuse_too_many(skipped_steps: int, allowed: int, named: str, path: Path) -> None:
    """Raise `RecipeError` when a run has left out more steps than its recipe allows."""
    if skipped_steps > allowed:
        raise RecipeError(
            f"{skipped_steps} steps had a loss or gradient that is not finite, more than "
            f"training.max_skipped_steps {allowed}; samples of the last: {named}, all are in "
            f"{path}. Look at them. With a higher training.max_skipped_steps the same command goes "
            "on; a lower training.learning_rate or training.clip_norm, or training.precision "
            f"float32, take a new name (name=NEW initialize_from={path.parents[1]}, which begins "
            "with this run's newest checkpoint, if it has one)"
        )
