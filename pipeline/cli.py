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

DATA_SET_OPTIONS = ("images", "annotations", "root", "shards", "name")
"""Of `prepare --format`, beside the format."""
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
    recipes = load_recipes(arguments.recipe)
    from pipeline.run import run_stages

    run_stages(recipes)


def prepare(arguments: argparse.Namespace) -> None:
    """`longtail prepare A.yaml`, or `--format FORMAT --images DIR` for one data set."""
    options = {key: getattr(arguments, key) for key in DATA_SET_OPTIONS}
    given = [f"--{key}" for key, value in options.items() if value is not None]
    if arguments.format is None:
        if given:
            raise RecipeError(f"{', '.join(given)} belong to --format; a recipe has these as keys")
        recipes = load_recipes(arguments.recipe)
        from pipeline.run import prepare_stages

        prepare_stages(recipes, soft_labels=arguments.soft_labels)
        return
    words, overrides = split_overrides(arguments.recipe)
    if words:
        raise RecipeError(f"give either recipes or --format, not both (got {', '.join(words)})")
    from pipeline.recipe.dataset import DataSet
    from pipeline.recipe_file import apply_override, section_from_tree

    source = {key: options[key] for key in ("images", "annotations") if options[key] is not None}
    source |= {"format": arguments.format, "name": arguments.name or arguments.format}
    data = {"root": arguments.root or ".", "shards": arguments.shards or os.path.abspath("shards")}
    tree: dict[str, object] = {"source": source, "data": data}
    for word in overrides:
        section = word.partition("=")[0].partition(".")[0]
        apply_override(tree, word if section in ("data", "cluster") else f"source.{word}")
    found = section_from_tree(DataSet, tree, "longtail prepare")
    from pipeline.preparation import prepare_dataset

    prepare_dataset(found.source, found.data, found.cluster)


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
    """`longtail check A.yaml`, or with `--workers N --gpu-memory 80` what it would need there."""
    recipes = load_recipes(arguments.recipe)
    options = (arguments.workers, arguments.gpu_memory, arguments.step_seconds)
    if all(value is None for value in options):
        from pipeline.check import check_stages

        print(check_stages(recipes))
        return
    from pipeline.check.prediction import Asked, predict_stage

    refusals = []
    for recipe in recipes:
        found = predict_stage(recipe, Asked(*options))
        print(found.text, flush=True)
        refusals += [found.refusal] if found.refusal else []
    if refusals:
        raise RecipeError("; ".join(refusals))


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
    if any(files) and (not all(files) or arguments.recipe or arguments.checkpoint):
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

    evaluate_stages(
        load_recipes(arguments.recipe),
        official=arguments.official,
        checkpoint=arguments.checkpoint,
    )


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


def import_checkpoint(arguments: argparse.Namespace) -> None:
    """`longtail import-checkpoint FILE --from ORIGIN`."""
    from pipeline.evaluation.import_checkpoint import import_checkpoint

    print(
        import_checkpoint(
            arguments.file,
            arguments.origin,
            arguments.output,
            annotations=arguments.annotations,
            ema=arguments.ema,
        )
    )


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


def vocabulary(arguments: argparse.Namespace) -> None:
    """`longtail vocabulary PLACE`, or `--map SOURCE TARGET`."""
    from pipeline.data.vocabulary import category_lists

    if (arguments.place is None) == (arguments.map is None):
        raise RecipeError(
            f"give one PLACE to list, or --map SOURCE TARGET; a place is {category_lists.KINDS}"
        )
    if arguments.map is None:
        found = category_lists.read_vocabulary(arguments.place, arguments.root)
        if arguments.synsets:
            found = category_lists.with_synsets(found, arguments.synsets)
        print(category_lists.list_csv(found), end="")
        return
    stems = [Path(place.partition(":")[2] or place).stem for place in arguments.map]
    output = arguments.output or f"{stems[0]}_to_{stems[1]}.csv"
    table, counts = category_lists.map_places(
        *arguments.map, root=arguments.root, synsets=arguments.synsets, output=output
    )
    print(table, end="")
    print(f"{output}: {counts}", file=sys.stderr)


def inspect(arguments: argparse.Namespace) -> None:
    """`longtail inspect SHARDS`, or of every source of a recipe."""
    from pipeline.report.inspection import inspect_sources

    places, overrides = split_overrides(arguments.shards)
    if len(places) != 1:
        raise RecipeError(f"inspect takes one folder of shards or one recipe, not {len(places)}")
    for text in inspect_sources(
        places[0],
        overrides,
        arguments.output,
        samples=arguments.samples,
        category=arguments.category,
        rare_first=arguments.rare,
        verify=arguments.verify,
    ):
        print(text, flush=True)


def study(arguments: argparse.Namespace) -> None:
    """`longtail study NAME ...`."""
    from pipeline.studies import run_study

    print(run_study(arguments, *split_overrides(arguments.place)), flush=True)


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """What is named, and the overrides: `section.key=value`, unless a file has that very name."""
    overrides = [word for word in words if _is_override(word)]
    return [word for word in words if word not in overrides], overrides


def _is_override(word: str) -> bool:
    key, equals, _ = word.partition("=")
    plain = key.replace(".", "").replace("-", "")  # A hyphen, so that the right key is suggested.
    return bool(equals) and plain.isidentifier() and not os.path.exists(word)


VERBS = {
    verb.__name__.replace("_", "-"): verb
    for verb in (
        run, prepare, train, check, show, report, evaluate, export, import_checkpoint, predict,
        vocabulary, inspect, study,
    )
}  # fmt: skip


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
    except BrokenPipeError:
        # Mostly who reads the output: `head` has enough after some lines.
        print(f"longtail {arguments.verb}: a pipe was closed at its other end", file=sys.stderr)
        code = 141
    except Exception as error:
        if isinstance(error, OSError) and error.errno in STORAGE_ERRORS:
            print(f"longtail {arguments.verb}: storage failed: {error}", file=sys.stderr)
            code = 74
        else:
            traceback.print_exc()
            print(f"longtail {arguments.verb}: this is a fault of longtail", file=sys.stderr)
            code = 70
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.stderr.flush()
    if "torch" in sys.modules:
        # A process that has used gloo can abort while Python tears down, with its work done.
        os._exit(code)
    sys.exit(code)
