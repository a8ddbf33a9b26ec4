"""The command line: a verb, recipes, and `section.key=value` overrides.

Heavy imports happen inside the verbs, so that `longtail --help` answers at once.
"""

import argparse
import errno
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import LongtailError, RecipeError

if TYPE_CHECKING:
    from pipeline.recipe import Recipe

STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO)

EPILOG = """\
Any recipe value can be overridden on the line: training.steps=100 data.root=/datasets.
Exit codes: 0 done; 75 stopped on request, run the same command to go on; 78 bad recipe;
65 bad data; 74 storage; 70 a fault of longtail."""


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="longtail",
        description="Long-tail object detection with soft labels from a frozen CLIP teacher.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    _stage_verb(verbs, "run", run, "prepare, train, evaluate and report, one stage per recipe")
    _stage_verb(verbs, "prepare", prepare, "write the tar shards and indexes of the recipes' data")
    _stage_verb(verbs, "train", train, "train only; shards and teacher must be there")
    _stage_verb(verbs, "check", check, "refuse what cannot work, before anything is spent")
    _stage_verb(verbs, "show", show, "print the complete resolved recipe and its hash")
    _stage_verb(verbs, "report", report, "write report.html of a run again")

    evaluate_parser = verbs.add_parser(
        "evaluate",
        help="AP of a recipe's newest checkpoint, or of a detections file",
        description="Evaluate a recipe's newest checkpoint, or any LVIS result file.",
    )
    evaluate_parser.add_argument("recipe", nargs="*", help="a recipe, then overrides")
    evaluate_parser.add_argument("--annotations", type=Path, help="ground truth, LVIS json")
    evaluate_parser.add_argument("--detections", type=Path, help="detections, LVIS result json")
    evaluate_parser.add_argument(
        "--official", action="store_true", help="run the lvis package beside, print differences"
    )
    evaluate_parser.add_argument("--json", type=Path, help="write the results here")
    evaluate_parser.set_defaults(handler=evaluate)

    export_parser = verbs.add_parser(
        "export", help="write the student alone, without teacher and semantic branch"
    )
    export_parser.add_argument("recipe", nargs="+", help="a recipe, then overrides")
    export_parser.add_argument("-o", "--output", type=Path, required=True, help="a new folder")
    export_parser.set_defaults(handler=export)
    return parser


def _stage_verb(
    verbs: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    handler: Callable[[argparse.Namespace], None],
    text: str,
) -> None:
    parser = verbs.add_parser(name, help=text, description=text[:1].upper() + text[1:] + ".")
    parser.add_argument("recipe", nargs="+", help="recipes in order, then overrides for all")
    parser.set_defaults(handler=handler)


def load_recipes(words: Sequence[str]) -> "list[Recipe]":
    """Recipes from paths and `section.key=value` overrides, which hold for every recipe."""
    from pipeline.recipe_file import load_recipe

    paths = [word for word in words if "=" not in word]
    overrides = [word for word in words if "=" in word]
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
        from pipeline.training.loop import train_here

        for recipe in recipes:
            train_here(recipe)
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
    """`longtail report A.yaml`."""
    from pipeline.report.page import write_report

    for recipe in load_recipes(arguments.recipe):
        print(write_report(recipe.run_dir))


def evaluate(arguments: argparse.Namespace) -> None:
    """`longtail evaluate A.yaml`, or `--annotations GT.json --detections DT.json`."""
    files = (arguments.annotations, arguments.detections)
    if any(files) and (not all(files) or arguments.recipe):
        raise RecipeError("give either a recipe, or both --annotations and --detections")
    if all(files):
        from pipeline.evaluation.results import evaluate_files

        print(evaluate_files(*files, out=arguments.json, official=arguments.official))
        return
    from pipeline.run import evaluate_stages

    evaluate_stages(load_recipes(arguments.recipe), official=arguments.official)


def export(arguments: argparse.Namespace) -> None:
    """`longtail export A.yaml -o DIR`."""
    from pipeline.run import export_stage

    recipes = load_recipes(arguments.recipe)
    if len(recipes) != 1:
        raise RecipeError(f"export takes one recipe, got {len(recipes)}")
    print(export_stage(recipes[0], arguments.output))


def main(argv: Sequence[str] | None = None) -> None:
    """Run a verb; what the user did wrong is one paragraph on stderr and the design's exit code."""
    arguments = build_parser().parse_args(argv)
    code = 0
    try:
        arguments.handler(arguments)
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
