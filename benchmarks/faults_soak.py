"""Many random kills over one training, for `faults.py --soak`."""

import random
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
from faults_processes import kill_teacher, kill_worker
from faults_storage import kill_in_save
from faults_trial import Trial, figures

KINDS = {"worker": 6, "save": 5, "teacher": 4, "driver": 3, "node": 2}
"""How often of 20: what dies most on clusters, most often."""
MOST_DELAY_S = 2.0
"""About the time of a step, so that kills come anywhere in one."""


def soak(
    work: Path, overrides: Sequence[str], kills: int, seed: int, say: Callable[[str], None]
) -> dict[str, object]:
    """`kills` kills; kinds, steps, workers and the time after the step that each comes at follow
    from `seed`. Figures as of a row."""
    rng = random.Random(seed)
    steps = 3 * kills + 8
    common = [*overrides, f"training.steps={steps}", "training.checkpoint_every=2"]
    undisturbed = Trial(work, f"soak_undisturbed_{steps}", common)
    if not undisturbed.run_dir.exists():
        say(f"the undisturbed training of {steps} steps")
    assert undisturbed.finish(1), f"see {undisturbed.log}"
    bag = [kind for kind, number in KINDS.items() for _ in range(number)]
    kinds = [kind for _ in range(-(-kills // len(bag))) for kind in rng.sample(bag, len(bag))]
    kinds = kinds[:kills]
    at_steps = sorted(rng.sample(range(2, steps - 6), kills))
    name = f"soak_{seed}"
    while (work / "runs" / name).exists():
        name += "x"
    trial = Trial(
        work, name, [*common, "teacher.placement=pool", f"cluster.max_failures={10 * kills}"]
    )
    trial.start()
    begun = time.monotonic()
    try:
        for number, (kind, step) in enumerate(zip(kinds, at_steps, strict=True), start=1):
            trial.wait_for_step(step)
            time.sleep(rng.uniform(0, MOST_DELAY_S))
            KILL[kind](trial, rng.randrange(2))
            say(f"kill {number} of {kills}: {kind} at step {step}, {trial.seconds[-1]:.1f} s")
        survived = trial.finish(trial.commands + 3)
        found = figures(trial, undisturbed, survived)
    finally:
        trial.close()
    counts = {kind: kinds.count(kind) for kind in KINDS}
    total = time.monotonic() - begun
    return {**found, "kills": counts, "steps": steps, "seed": seed, "total_seconds": round(total)}


def _worker(trial: Trial, which: int) -> None:
    back = trial.recovery()
    kill_worker(trial, which)
    back()


def _driver(trial: Trial, _: int) -> None:
    back = trial.recovery()
    trial.process.send_signal(signal.SIGKILL)
    trial.end()
    trial.start()
    back()


def _node(trial: Trial, _: int) -> None:
    """The only node there is: its raylet dies, and Ray and the driver with it."""
    back = trial.recovery()
    for process in trial.process.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.name() == "raylet":
                process.kill()
    trial.end(300.0)
    trial.start()
    back()


KILL = {
    "worker": _worker,
    "driver": _driver,
    "node": _node,
    "teacher": lambda trial, _: kill_teacher(trial),
    "save": lambda trial, _: kill_in_save(trial),
}
