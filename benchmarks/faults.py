"""Faults put into one small training, by `longtail train` as users run it, and what became of it.

    python benchmarks/faults.py --work runs/faults                       # every fault, then a table
    python benchmarks/faults.py --work runs/faults --only sigterm --only disk_full
    python benchmarks/faults.py --work runs/faults --soak --kills 20 --seed 0
    python benchmarks/faults.py --work runs/faults --report    # the table of what is there

Each fault gets a training of its own, beside one that is left alone. Lost and repeated samples are
those of the steps that counted, by the runs' own ledgers (`logging.samples`), against the ledger of
the undisturbed run; the end is equal when weights, averages and moments have the same sha256.
Results are kept in results.json, and rows that are there are not run again. Overrides
(`training.steps=40`) hold for all runs of a work folder.
"""

import argparse
import json
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from faults_rows import ROWS
from faults_soak import soak
from faults_storage import unmount
from faults_trial import NotAvailable, Trial, figures, run_longtail

from pipeline.training.manifest import newest_verified, read_manifest, write_atomically

HEAD = (
    "fault", "survived", "lost", "repeated", "redone", "seconds to recover", "commands", "same end",
)  # fmt: skip


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def prepare(work: Path, overrides: Sequence[str]) -> Trial:
    """World, shards and teacher, and the training that nothing disturbs, where they are missing."""
    trial = Trial(work, "undisturbed", overrides)
    recipe = trial.recipe
    newest = newest_verified(recipe.run_dir)
    if newest is not None and read_manifest(newest).step == recipe.training.steps:
        return trial
    trial.log.parent.mkdir(parents=True, exist_ok=True)
    say("preparing world, shards and teacher")
    process = run_longtail("prepare", trial.overrides, trial.log)
    assert process.wait() == 0, f"see {trial.log}"
    say("the undisturbed training")
    assert trial.finish(1), f"see {trial.log}"
    return trial


def run_row(name: str, work: Path, overrides: Sequence[str]) -> dict[str, object]:
    """One fault; what went wrong with it is its result, too."""
    (row,) = [row for row in ROWS if row.name == name]
    undisturbed = prepare(work, overrides)
    trial = Trial(work, fresh_name(work, name), overrides)
    try:
        survived = row.run(trial)
        return figures(trial, trial.reference or undisturbed, survived)
    except NotAvailable as error:
        return {"not_available": str(error)}
    except Exception as error:
        traceback.print_exc()
        return {"survived": False, "notes": [*trial.notes, f"{error!r}, see {trial.log}"]}
    finally:
        trial.close()
        unmount(trial)


def fresh_name(work: Path, name: str) -> str:
    """A run of its own each time: the old ones are left for who wants to look."""
    number = 1
    while (work / "runs" / f"{name}_{number}").exists():
        number += 1
    return f"{name}_{number}"


def markdown(results: dict[str, dict]) -> str:
    """The table of the rows that there are results of."""
    lines = ["| " + " | ".join(HEAD) + " |", "|---|---|--:|--:|--:|--:|--:|---|"]
    for row in ROWS:
        found = results.get(row.name)
        if found is not None:
            lines.append(f"| {row.title} | {' | '.join(cells(found))} |")
    return "\n".join(lines)


def cells(found: dict) -> list[str]:
    """The cells of a row behind its title."""
    if "not_available" in found:
        return [f"not run: {found['not_available']}", *[""] * 6]
    if "lost" not in found or not found["survived"]:
        return ["no", *[""] * 6]
    differing = found["differing"]
    seconds = ", ".join(f"{one:.0f}" for one in found["seconds"])
    return [
        "yes",
        str(found["lost"]),
        str(found["repeated"]),
        f"{found['redone']}" + (f" ({differing} NOT THE SAME)" if differing else ""),
        seconds,
        str(found["commands"]),
        "yes" if found["equal"] else "NO",
    ]


def passed(found: dict) -> bool:
    """Whether a row, or the soak, keeps the promise; one that cannot be run here breaks none."""
    if "not_available" in found:
        return True
    wrong = [found.get(name) != 0 for name in ("lost", "repeated", "differing")]
    return bool(found.get("equal")) and not any(wrong)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", action="append", choices=[row.name for row in ROWS], default=None)
    parser.add_argument("--soak", action="store_true")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", action="store_true")
    arguments, rest = parser.parse_known_args()
    overrides = [word for word in rest if "=" in word and not word.startswith("-")]
    if overrides != rest:
        parser.error(f"unknown: {' '.join(word for word in rest if word not in overrides)}")
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    if arguments.soak:
        found = soak(work, overrides, arguments.kills, arguments.seed, say)
        write_atomically(work / "soak.json", json.dumps(found, indent=1))
        say(json.dumps(found))
        return 0 if passed(found) else 1
    path = work / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    names = arguments.only or [row.name for row in ROWS if row.name not in results]
    for name in [] if arguments.report else names:
        say(f"{name} ...")
        results[name] = run_row(name, work, overrides)
        say(f"{name}: {json.dumps({**results[name], 'sha256': None})}")
        write_atomically(path, json.dumps(results, indent=1))
    print(markdown(results))
    return 0 if all(passed(found) for found in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
