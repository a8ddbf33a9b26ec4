"""The verbs of the command line; `arguments.py` has what may stand behind each.

Heavy imports happen inside the verbs, so that `longtail --help` answers at once.
"""

import argparse
import errno
import os
import sys
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.arguments import CHECKPOINT, build_parser
from pipeline.errors import LongtailError, RecipeError

if TYPE_CHECKING:
    from pipeline.recipe import Recipe

STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO)


def load_recipes(words: Sequence[str]) -> "list[Recipe]":
    """Recipes from paths and `section.key=value` overrides, which hold for every recipe."""
    from pipeline.recipe_file import load_recipe

    paths, overrides = split_overrides(words)
    if not paths:
        raise RecipeError("no recipe given; name a YAML file, such as recipes/quickstart.yaml")
    return [load_recipe(path, overrides) for path in paths]


def run(arguments: argparse.Namespace) -> None:
    """`longtail run A.yaml B.yaml`."""
    from pipeline.run import run_stages

    run_stages(load_recipes(arguments.recipe))


def prepare(arguments: argparse.Namespace) -> None:
    """`longtail prepare A.yaml`."""
    from pipeline.run import prepare_stages

    prepare_stages(load_recipes(arguments.recipe))


def train(arguments: argparse.Namespace) -> None:
    """`longtail train A.yaml`, or the same under torchrun, where each process is one worker."""
    recipes = load_recipes(arguments.recipe)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        from pipeline.evaluation.checkpoints import evaluate_all_waiting
        from pipeline.training.loop import train_here

        for recipe in recipes:
            train_here(recipe, partial(evaluate_all_waiting, recipe))
        return
    from pipeline.run import train_stages

    train_stages(recipes)


def check(arguments: argparse.Namespace) -> None:
    """`longtail check A.yaml`."""
    from pipeline.check import check_stages

    print(check_stages(load_recipes(arguments.recipe)))


def show(arguments: argparse.Namespace) -> None:
    """`longtail show A.yaml`."""
    for recipe in load_recipes(arguments.recipe):
        print(f"# {recipe.name}: hash {recipe.hash()}")
        print(recipe.to_yaml(), end="")


def report(arguments: argparse.Namespace) -> None:
    """`longtail report RUN...`: a run directory or a recipe each; several are compared."""
    from pipeline.report.compare import write_comparison
    from pipeline.report.page import write_report

    words, overrides = split_overrides(arguments.run)
    if not words:
        raise RecipeError("no run given; name a run directory or a recipe, such as runs/quickstart")
    run_dirs = [_run_dir(word, overrides) for word in words]
    if len(run_dirs) == 1:
        print(write_report(run_dirs[0], arguments.output))
        return
    print(write_comparison(run_dirs, arguments.output or Path("comparison.html")))


def _run_dir(word: str, overrides: Sequence[str]) -> Path:
    from pipeline.recipe_file import load_recipe

    path = Path(word)
    if path.is_dir():
        return path
    if not path.is_file():
        raise RecipeError(
            f"{word} is neither a run directory nor a recipe; name one that exists, such as "
            "runs/quickstart or recipes/quickstart.yaml"
        )
    return load_recipe(word, overrides).run_dir


def evaluate(arguments: argparse.Namespace) -> None:
    """`longtail evaluate A.yaml`, or `--annotations GT.json --detections DT.json`."""
    files = (arguments.annotations, arguments.detections)
    if any(files) and (not all(files) or arguments.recipe):
        raise RecipeError("give either a recipe, or both --annotations and --detections")
    if all(files):
        from pipeline.evaluation.files import check_output, evaluate_files
        from pipeline.evaluation.results import save_results

        if arguments.json:
            check_output(arguments.json)
        text, results = evaluate_files(
            arguments.annotations,
            arguments.detections,
            protocol=arguments.protocol,
            images=arguments.images,
            score_threshold=arguments.score_threshold,
            official=arguments.official,
        )
        print(text, flush=True)
        if arguments.json:
            save_results(arguments.json, results)
        return
    of_files = ("protocol", "images", "score_threshold", "json")
    given = [
        f"--{name.replace('_', '-')}" for name in of_files if getattr(arguments, name) is not None
    ]
    if given:
        raise RecipeError(
            f"{', '.join(given)} belong to --annotations and --detections; a recipe has its "
            "evaluation section"
        )
    from pipeline.run import evaluate_stages

    evaluate_stages(load_recipes(arguments.recipe), official=arguments.official)


def export(arguments: argparse.Namespace) -> None:
    """`longtail export CHECKPOINT -o DIR`, or `--onnx -o NAME.onnx`."""
    from pipeline.training.locate import locate_checkpoint

    places, overrides = split_overrides(arguments.checkpoint)
    if len(places) != 1:
        raise RecipeError(f"export takes one checkpoint, not {len(places)}: {CHECKPOINT}")
    if arguments.size and not arguments.onnx:
        raise RecipeError("--size belongs to --onnx; a folder works for images of any size")
    found = locate_checkpoint(places[0], overrides)
    if arguments.onnx:
        from pipeline.evaluation.onnx_export import export_onnx, parse_size
        from pipeline.evaluation.predict import load_detector

        size = parse_size(arguments.size) if arguments.size else None
        print(export_onnx(load_detector(found), arguments.output, size))
    else:
        from pipeline.training.checkpoint import export_detector

        export_detector(found, arguments.output)
    print(arguments.output)


def predict(arguments: argparse.Namespace) -> None:
    """`longtail predict CHECKPOINT IMAGE...`."""
    from pipeline.training.locate import locate_checkpoint

    images, overrides = split_overrides(arguments.images)
    if not images:
        raise RecipeError("no image given; name image files, folders or globs")
    found = locate_checkpoint(arguments.checkpoint, overrides)
    names = arguments.categories
    from pipeline.evaluation.predictions import predict_stage

    predict_stage(
        found,
        images,
        arguments.output,
        score_threshold=arguments.score_threshold,
        top_k=arguments.top_k,
        categories=None if names is None else [name.strip() for name in names.split(",")],
        device=arguments.device,
    )


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """What is named, and the overrides: `section.key=value`, unless a file has that very name."""
    overrides = [word for word in words if _is_override(word)]
    return [word for word in words if word not in overrides], overrides


def _is_override(word: str) -> bool:
    key, equals, _ = word.partition("=")
    plain = key.replace(".", "").replace("-", "")  # A hyphen, so that the right key is suggested.
    return bool(equals) and plain.isidentifier() and not os.path.exists(word)


VERBS = {
    verb.__name__: verb
    for verb in (run, prepare, train, check, show, report, evaluate, export, predict)
}


def show_log() -> None:
    """What the package logs is shown from here on."""
    import logging

    from pipeline.progress import LogLines

    log = logging.getLogger("pipeline")
    log.setLevel(logging.INFO)
    log.handlers = [LogLines()]
    log.propagate = False


def main(argv: Sequence[str] | None = None) -> None:
    """Run a verb; what the user did wrong is one paragraph on stderr and the design's exit code."""
    arguments = build_parser().parse_args(argv)
    show_log()
    code = 0
    try:
        VERBS[arguments.verb](arguments)
    except LongtailError as error:
        print(f"longtail {arguments.verb}: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print(f"longtail {arguments.verb}: interrupted; run it again to go on", file=sys.stderr)
        code = 75
    except Exception as error:
        if isinstance(error, OSError) and error.errno in STORAGE_ERRORS:
            print(f"longtail {arguments.verb}: storage failed: {error}", file=sys.stderr)
            code = 74
        else:
            traceback.print_exc()
            print(f"longtail {arguments.verb}: this is a fault of longtail", file=sys.stderr)
            code = 70
    sys.stdout.flush()
    sys.stderr.flush()
    if "torch" in sys.modules:
        # A process that has used gloo can abort while Python tears down, with its work done.
        os._exit(code)
    sys.exit(code)
