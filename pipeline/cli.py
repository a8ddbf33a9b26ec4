"""The command line: a verb, recipes, and `section.key=value` overrides.

Heavy imports happen inside the verbs, so that `longtail --help` answers at once.
"""

import argparse
import errno
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import LongtailError, RecipeError

if TYPE_CHECKING:
    from pipeline.recipe import Recipe

STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO)

CHECKPOINT = "exported folder, checkpoints/step_N folder, run directory, or recipe with overrides"

PROTOCOLS = (
    "lvis", "coco", "objects365", "openimages", "visual_genome", "voc2007", "voc2010",
)  # fmt: skip

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

    report_parser = verbs.add_parser(
        "report",
        help="write report.html of a run again, or compare several runs",
        description="Write a run's report.html, or one page that compares several runs.",
    )
    report_parser.add_argument(
        "run", nargs="+", help="run directories or recipes, then overrides for the recipes"
    )
    report_parser.add_argument(
        "-o",
        "--output",
        type=Path,
        help="write a comparison here (comparison.html for several runs)",
    )
    report_parser.set_defaults(handler=report)

    evaluate_parser = verbs.add_parser(
        "evaluate",
        help="AP of a recipe's newest checkpoint, or of a detections file",
        description="Evaluate a recipe's newest checkpoint, or any LVIS result file.",
    )
    evaluate_parser.add_argument("recipe", nargs="*", help="a recipe, then overrides")
    evaluate_parser.add_argument("--annotations", type=Path, help="ground truth, LVIS or COCO json")
    evaluate_parser.add_argument("--detections", type=Path, help="detections, LVIS or COCO results")
    evaluate_parser.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        help="of the annotations; by default LVIS where images list neg_category_ids, else COCO",
    )
    evaluate_parser.add_argument(
        "--images", type=Path, help="json list of image ids, or a json with the images to evaluate"
    )
    evaluate_parser.add_argument(
        "--score-threshold",
        type=float,
        help="where precision, recall and IoU are counted; by default where F1 is largest",
    )
    evaluate_parser.add_argument(
        "--official", action="store_true", help="run the lvis package beside, print differences"
    )
    evaluate_parser.add_argument("--json", type=Path, help="write all figures here")
    evaluate_parser.set_defaults(handler=evaluate)

    export_parser = verbs.add_parser(
        "export",
        help="write the detector alone: safetensors in a folder, or one ONNX file",
        description="Write the detector alone, without teacher, semantic branch and optimizer.",
    )
    export_parser.add_argument("checkpoint", nargs="+", metavar="CHECKPOINT", help=CHECKPOINT)
    export_parser.add_argument(
        "-o", "--output", type=Path, required=True, help="a new folder, or NAME.onnx with --onnx"
    )
    export_parser.add_argument(
        "--onnx", action="store_true", help="one ONNX file, compared with PyTorch after writing"
    )
    export_parser.add_argument(
        "--size", metavar="HxW", help="image size of the ONNX file; the evaluation's, 4:3, if none"
    )
    export_parser.set_defaults(handler=export)

    predict_parser = verbs.add_parser(
        "predict",
        help="draw a checkpoint's detections on any images, and write them as json",
        description="Draw detections on images; all of them go to predictions.json.",
    )
    predict_parser.add_argument("checkpoint", metavar="CHECKPOINT", help=CHECKPOINT)
    predict_parser.add_argument(
        "images", nargs="+", metavar="IMAGE", help="image files, folders or globs"
    )
    predict_parser.add_argument(
        "-o", "--output", type=Path, default=Path("predictions"), help="folder (predictions/)"
    )
    predict_parser.add_argument(
        "--score-threshold", type=float, default=0.3, help="the least score (0.3)"
    )
    predict_parser.add_argument(
        "--top-k", type=int, default=100, help="at most so many detections an image (100)"
    )
    predict_parser.add_argument("--categories", help="only these names, with commas between")
    predict_parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="where to compute; a GPU if there is one"
    )
    predict_parser.set_defaults(handler=predict)
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

    overrides = [word for word in arguments.run if "=" in word and not Path(word).is_dir()]
    words = [word for word in arguments.run if word not in overrides]
    if not words:
        raise RecipeError("no run given; name a run directory or a recipe, such as runs/quickstart")
    run_dirs = [_run_dir(word, overrides) for word in words]
    if len(run_dirs) == 1 and arguments.output is None:
        print(write_report(run_dirs[0]))
        return
    print(write_comparison(run_dirs, arguments.output or Path("comparison.html")))


def _run_dir(word: str, overrides: Sequence[str]) -> Path:
    path = Path(word)
    if path.is_dir():
        return path
    if not path.is_file():
        raise RecipeError(
            f"{word} is neither a run directory nor a recipe; name one that exists, such as "
            "runs/quickstart or recipes/quickstart.yaml"
        )
    return load_recipes([word, *overrides])[0].run_dir


def evaluate(arguments: argparse.Namespace) -> None:
    """`longtail evaluate A.yaml`, or `--annotations GT.json --detections DT.json`."""
    files = (arguments.annotations, arguments.detections)
    if any(files) and (not all(files) or arguments.recipe):
        raise RecipeError("give either a recipe, or both --annotations and --detections")
    if all(files):
        from pipeline.evaluation.files import evaluate_files

        text = evaluate_files(
            arguments.annotations,
            arguments.detections,
            protocol=arguments.protocol,
            images=arguments.images,
            score_threshold=arguments.score_threshold,
            out=arguments.json,
            official=arguments.official,
        )
        print(text)
        return
    of_files = ("protocol", "images", "score_threshold", "json")
    given = [f"--{name.replace('_', '-')}" for name in of_files if getattr(arguments, name)]
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

    place, *overrides = arguments.checkpoint
    if arguments.size and not arguments.onnx:
        raise RecipeError("--size belongs to --onnx; a folder works for images of any size")
    found = locate_checkpoint(place, overrides)
    if arguments.onnx:
        from pipeline.evaluation.onnx_export import export_onnx, parse_size
        from pipeline.evaluation.predict import load_detector

        size = parse_size(arguments.size) if arguments.size else None
        print(export_onnx(load_detector(found), arguments.output, size))
    else:
        from pipeline.training.checkpoint import export_detector

        export_detector(found.directory, arguments.output, found.recipe.evaluation.use_ema)
    print(arguments.output)


def predict(arguments: argparse.Namespace) -> None:
    """`longtail predict CHECKPOINT IMAGE...`."""
    from pipeline.training.locate import locate_checkpoint

    overrides = [word for word in arguments.images if is_override(word)]
    images = [word for word in arguments.images if word not in overrides]
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


def is_override(word: str) -> bool:
    """Whether a word among files is a `section.key=value`, and not a file that has that name."""
    key, equals, _ = word.partition("=")
    return bool(equals) and key.replace(".", "").isidentifier() and not Path(word).exists()


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
