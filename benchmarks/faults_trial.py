"""One training of `faults.py`: its commands and processes, how far it is, and how it ended."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from pipeline.recipe import Recipe
from pipeline.recipe_file import load_recipe
from pipeline.training.manifest import Manifest, checkpoint_dir, verify
from pipeline.training.samples import read_samples

HERE = Path(__file__).resolve().parent
RECIPE = HERE / "faults.yaml"
PATIENCE_S = 900.0
"""Only what hangs takes so many seconds, on a machine that others use too."""
LOOK_S = 0.05
MOST_COMMANDS = 4
"""How often the same command is given before a fault counts as not survived."""
WORKER, TEACHER, EVALUATION = "ray::RayTrainWorker", "ray::TeacherActor", "ray::_call_quietly"
"""What the command lines of Ray's processes begin with."""


class NotAvailable(Exception):  # noqa: N818 - a finding, not an error
    """This machine, or this version of the package, cannot do the row; the text says why."""


class Trial:
    """`longtail train` on the recipe with overrides, in a run directory of its own."""

    def __init__(self, work: Path, name: str, overrides: Sequence[str] = ()) -> None:
        self.work, self.name = work, name
        self.overrides = [
            f"data.root={work / 'world'}", f"output={work / 'runs'}", f"name={name}", *overrides,
        ]  # fmt: skip
        self.environment: dict[str, str] = {}
        self.commands = 0
        self.exit_codes: list[int] = []
        self.process: psutil.Popen | None = None
        self.notes: list[str] = []
        self.seconds: list[float] = []
        self.reference: Trial | None = None
        """What the end is compared with, where it is not the undisturbed run."""
        self.mounted: Path | None = None

    @property
    def recipe(self) -> Recipe:
        """What the commands read."""
        return load_recipe(RECIPE, self.overrides)

    @property
    def run_dir(self) -> Path:
        """The run directory, known without reading the recipe."""
        return self.work / "runs" / self.name

    @property
    def middle(self) -> int:
        """The step after which a fault comes, in mid-training."""
        return self.recipe.training.steps * 5 // 12

    @property
    def log(self) -> Path:
        """What the commands print."""
        return self.work / "logs" / f"{self.name}.log"

    def start(self) -> None:
        """Give the command, the same each time."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.process = run_longtail("train", self.overrides, self.log, self.environment)
        self.commands += 1

    def end(self, patience_s: float = PATIENCE_S) -> int:
        """Wait for the command's end, and end it when that does not come; its exit code."""
        assert self.process is not None
        try:
            code = int(self.process.wait(timeout=patience_s))
        except psutil.TimeoutExpired:
            self.notes.append(f"the command had not ended after {patience_s:.0f} s and was killed")
            self.close()
            code = int(self.process.wait())
        self.exit_codes.append(code)
        return code

    def finish(self, most: int = MOST_COMMANDS) -> bool:
        """Give the command until it ends with 0; whether it has, of at most `most` times."""
        while True:
            if self.process is None:
                self.start()
            if self.end() == 0:
                return True
            self.process = None
            if self.commands >= most:
                return False

    def steps(self) -> list[tuple[int, int]]:
        """(attempt, step) of each line that the first rank has written."""
        path = self.run_dir / "samples_rank0.jsonl"
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        found = []
        for line in lines:
            with suppress(ValueError):
                entry = json.loads(line)
                if "step" in entry:
                    found.append((entry["attempt"], entry["step"]))
        return found

    def wait(self, what: str, condition: Callable[[], object], *, running: bool = True) -> None:
        """Return when `condition()` is true; the command must be running until then."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            if running and self.process is not None and self.process.poll() is not None:
                raise AssertionError(f"the command ended with {self.process.poll()} before {what}")
            if time.monotonic() > deadline:
                raise AssertionError(f"no {what} within {PATIENCE_S:.0f} s")
            time.sleep(LOOK_S)

    def wait_for_step(self, step: int) -> None:
        """Return when some attempt has done a step."""
        self.wait(f"step {step}", lambda: any(done >= step for _, done in self.steps()))

    def processes(self, title: str) -> list[psutil.Process]:
        """Processes below the command whose command line begins with `title`."""
        found = []
        for process in self.process.children(recursive=True):
            with suppress(psutil.Error):
                if " ".join(process.cmdline()).startswith(title):
                    found.append(process)
        return found

    def recovery(
        self, *, restarts: bool = True, under_way: int = 1, again: bool = False
    ) -> Callable[[], None]:
        """Call it just before the fault; what it gives returns when a step is done again, and keeps
        the seconds.

        With `restarts` that is the first step of a later attempt than now, which may be one that
        is done a second time, else the one after those that have their data already, `under_way`
        of them. With `again` the command is given once more where it ends before.
        """
        begun, before = time.monotonic(), self.steps()

        def is_back() -> bool:
            now = self.steps()
            return now[-1][0] > before[-1][0] if restarts else len(now) > len(before) + under_way

        def is_back_or_begun_again() -> bool:
            if again and self.process.poll() is not None and self.commands < MOST_COMMANDS:
                self.end()
                self.start()
            return is_back()

        def wait() -> None:
            self.wait("a step after the fault", is_back_or_begun_again, running=not again)
            self.seconds.append(time.monotonic() - begun)

        return wait

    def result(self) -> Manifest:
        """The verified last checkpoint."""
        return verify(checkpoint_dir(self.run_dir, self.recipe.training.steps))

    def close(self) -> None:
        """End what is left of the command; Ray's processes follow it."""
        if self.process is not None and self.process.poll() is None:
            below = self.process.children(recursive=True)
            for process in (self.process, *below):
                with suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(below, timeout=10)


def run_longtail(
    verb: str, overrides: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> psutil.Popen:
    """`longtail VERB` on the recipe as a process, with its output in `log`."""
    with log.open("ab") as stream:
        return psutil.Popen(
            [sys.executable, "-m", "pipeline", verb, str(RECIPE), *overrides],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
            start_new_session=True,
            preexec_fn=_signals_as_usual,
        )


def _signals_as_usual() -> None:
    """A shell ignores SIGINT for what it runs in the background, and children would too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def figures(trial: Trial, undisturbed: Trial, survived: bool) -> dict[str, object]:
    """A row of the table: what the run's ledger and last checkpoint say beside the undisturbed."""
    ledger = read_samples(trial.run_dir)
    reference = read_samples(undisturbed.run_dir)
    training = undisturbed.recipe.training
    # What both runs lost would not be seen in a comparison of the two.
    totals = [record.samples.total() for record in reference.counted.values()]
    assert not reference.missing(training.steps), f"steps are missing of {undisturbed.name}"
    assert totals == [training.batch_size] * training.steps, f"{undisturbed.name}: {totals}"
    files = trial.result().files if survived else {}
    return {
        "survived": survived,
        "attempts": ledger.attempts,
        "lost": reference.beyond(ledger).total() if survived else None,
        "repeated": ledger.beyond(reference).total() if survived else None,
        "redone": len(ledger.redone),
        "differing": len(ledger.differing),
        "seconds": [round(seconds, 1) for seconds in trial.seconds],
        "commands": trial.commands,
        "exit_codes": trial.exit_codes,
        "sha256": {name: stated["sha256"] for name, stated in files.items()},
        "equal": survived and files == undisturbed.result().files,
        "notes": trial.notes,
    }
