"""The words of `longtail study`: its studies and their options."""

import argparse
from collections.abc import Callable
from pathlib import Path

TOPICS = {
    "teacher-zero-shot": "how well the teacher names ground-truth boxes (supplement, Table 2)",
    "teacher-noise": "the same while the boxes are jittered (supplement, Figure 1)",
    "drop-annotations": "training annotations with a fraction removed (supplement, Figure 2)",
    "frequency": "instances of each category, sorted (supplement, Figure 3)",
    "qualitative": "two checkpoints side by side on rare objects (supplement, Figure 4)",
}


def study_verb(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb with one parser for each study."""
    text = "studies of teacher and data, each a page with its table, plot and figures"
    parser = verbs.add_parser("study", help=text, description=text[:1].upper() + text[1:] + ".")
    studies = parser.add_subparsers(dest="study", metavar="STUDY", required=True)
    adders: dict[str, Callable[[argparse.ArgumentParser], None]] = {
        "teacher-zero-shot": _zero_shot,
        "teacher-noise": _noise,
        "drop-annotations": _drop,
        "frequency": _frequency,
        "qualitative": _qualitative,
    }
    for study, topic in TOPICS.items():
        adders[study](
            studies.add_parser(study, help=topic, description=topic[:1].upper() + topic[1:] + ".")
        )


def _zero_shot(parser: argparse.ArgumentParser) -> None:
    _recipe(parser)
    _images(parser)
    _device(parser)
    _folder(parser)


def _noise(parser: argparse.ArgumentParser) -> None:
    _recipe(parser)
    parser.add_argument(
        "--levels", type=int, default=11, help="so many levels, evenly from 0 to 1 (11)"
    )
    _images(parser)
    _device(parser)
    _folder(parser)


def _drop(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "place",
        nargs="+",
        metavar="PLACE",
        help="annotation json, or RECIPE.yaml[:SOURCE] (its first train source), then overrides",
    )
    parser.add_argument(
        "--fraction",
        type=float,
        required=True,
        help="of the annotations to remove, above 0, below 1",
    )
    parser.add_argument("--seed", type=int, default=0, help="which annotations are removed (0)")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        help="FILE.json to write; FILE.html and FILE.csv go beside it",
    )


def _frequency(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "place",
        nargs="+",
        metavar="PLACE",
        help="folders or URLs of a source's shards, or RECIPE.yaml[:SOURCE], then overrides",
    )
    _folder(parser)


def _qualitative(parser: argparse.ArgumentParser) -> None:
    _recipe(parser)
    parser.add_argument(
        "--checkpoints",
        nargs=2,
        metavar=("A", "B"),
        required=True,
        help="two of: exported folder or file, checkpoints/step_N folder, run directory, recipe",
    )
    parser.add_argument("--images", type=int, default=8, help="at most so many images (8)")
    parser.add_argument(
        "--score-threshold", type=float, default=0.3, help="least score of a detection (0.3)"
    )
    parser.add_argument("--seed", type=int, default=0, help="which of the images are shown (0)")
    _device(parser)
    _folder(parser)


def _recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("place", nargs="+", metavar="RECIPE", help="a recipe, then overrides")


def _images(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--images", type=int, help="so many validation images, drawn by the seed (all)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn at random (0)")


def _device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="where to compute; a GPU if there is one"
    )


def _folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("studies"), help="folder (studies/)"
    )
