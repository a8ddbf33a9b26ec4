"""The words of the command line: verbs, recipes, `section.key=value` overrides, and options."""

import argparse
from pathlib import Path

from pipeline.study.arguments import study_verb

CHECKPOINT = (
    "exported folder or file, checkpoints/step_N folder, run directory, or recipe with overrides"
)

PROTOCOLS = (
    "lvis", "coco", "objects365", "openimages", "visual_genome", "voc2007", "voc2010",
)  # fmt: skip

ORIGINS = ("dino", "richsem", "detrex")

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
    _stage_verb(verbs, "run", "prepare, train, evaluate and report, one stage per recipe")
    _prepare_verb(verbs)
    _stage_verb(verbs, "train", "train only; shards and teacher must be there")
    _check_verb(verbs)
    _stage_verb(verbs, "show", "print the complete resolved recipe and its hash")

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
        help="write the page here (RUN/report.html for one run, comparison.html for several)",
    )

    evaluate_parser = verbs.add_parser(
        "evaluate",
        help="AP of a recipe's newest checkpoint, or of a detections file",
        description=(
            "Evaluate a recipe's newest checkpoint, or anybody's detections in a result json, "
            "under the protocol of LVIS, COCO or Pascal VOC."
        ),
    )
    evaluate_parser.add_argument("recipe", nargs="*", help="a recipe, then overrides")
    evaluate_parser.add_argument(
        "--checkpoint",
        type=Path,
        help="an exported or imported detector in the place of the recipe's newest checkpoint",
    )
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
        help="least score for precision, recall and IoU; by default that of the largest F1",
    )
    evaluate_parser.add_argument(
        "--official", action="store_true", help="run the lvis package beside, print differences"
    )
    evaluate_parser.add_argument("--json", type=Path, help="write all figures here")

    export_parser = verbs.add_parser(
        "export",
        help="write the detector alone: safetensors, in a folder or alone, or one ONNX file",
        description="Write the detector alone, without teacher, semantic branch and optimizer.",
    )
    export_parser.add_argument("checkpoint", nargs="+", metavar="CHECKPOINT", help=CHECKPOINT)
    export_parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        help="a new folder, one NAME.safetensors, or NAME.onnx with --onnx",
    )
    export_parser.add_argument(
        "--onnx", action="store_true", help="one ONNX file, compared with PyTorch after writing"
    )
    export_parser.add_argument(
        "--size", metavar="HxW", help="image size of the ONNX file; the evaluation's, 4:3, if none"
    )

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
    _import_verb(verbs)
    _vocabulary_verb(verbs)
    _inspect_verb(verbs)
    study_verb(verbs)
    return parser


def _prepare_verb(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = verbs.add_parser(
        "prepare",
        help="write the tar shards and indexes of the recipes' data, or of one data set",
        description=(
            "Write the tar shards and indexes of the recipes' data, or with --format of one data "
            "set without a recipe. Run again, it goes on where it was stopped."
        ),
    )
    parser.add_argument(
        "recipe",
        nargs="*",
        help="recipes, then overrides; with --format, further keys of the source, such as "
        "files.classes=classes.csv or use_labels=false, data.KEY=... and cluster.KEY=...",
    )
    parser.add_argument("--format", help="prepare one data set, published in this form")
    parser.add_argument("--images", help="its folder or archive of images")
    parser.add_argument("--annotations", help="its annotation file")
    parser.add_argument("--root", help="folder or URL that these paths start from (.)")
    parser.add_argument("--shards", help="folder or URL to write NAME/000000.tar to (shards/)")
    parser.add_argument("--name", help="of the source, and of its folder (the format)")
    parser.add_argument(
        "--soft-labels",
        action="store_true",
        help="also make the soft labels that recipes with teacher.stored read",
    )


def _check_verb(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = _stage_verb(verbs, "check", "refuse what cannot work, before anything is spent")
    group = parser.add_argument_group(
        "prediction",
        "With one of these: the memory of each worker, time, data and GPU-hours, for a cluster and "
        "data that need not be here (docs/scale.md).",
    )
    group.add_argument("--workers", type=int, help="on so many workers (cluster.workers)")
    group.add_argument("--gpu-memory", type=float, metavar="GB", help="does it fit into so much?")
    group.add_argument("--step-seconds", type=float, metavar="S", help="a step takes so long")


def _vocabulary_verb(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = verbs.add_parser(
        "vocabulary",
        help="list the categories of a data set, or map them to those of another, for review",
        description=(
            "List categories as csv, or write which category of one data set is which of another: "
            "by synset, then by name, then by alias, with candidates for the rest. Corrected by "
            "hand, the csv is `category_map` of a source."
        ),
    )
    parser.add_argument(
        "place",
        nargs="?",
        metavar="PLACE",
        help="annotation json, csv or tsv, prepared shards, RECIPE.yaml[:SOURCE], or a short name",
    )
    parser.add_argument(
        "--map", nargs=2, metavar=("SOURCE", "TARGET"), help="two places, to map one to the other"
    )
    parser.add_argument("--synsets", help="json or csv of names and synsets, for those without")
    parser.add_argument("--root", default=".", help="where short names such as LVIS lead (.)")
    parser.add_argument("-o", "--output", help="the csv to write (SOURCE_to_TARGET.csv)")


def _inspect_verb(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = verbs.add_parser(
        "inspect",
        help="counts of prepared shards, a frequency plot, and pictures with their boxes",
        description="Say what prepared shards hold, and draw it on one page for each source.",
    )
    parser.add_argument(
        "shards",
        nargs="+",
        metavar="SHARDS",
        help="folder or URL of a source's shards, or a recipe, then overrides",
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("inspection"), help="folder (inspection/)"
    )
    parser.add_argument("--samples", type=int, default=24, help="so many pictures (24)")
    parser.add_argument("--category", metavar="NAME", help="only pictures with this category")
    parser.add_argument("--rare", action="store_true", help="pictures of rare categories first")
    parser.add_argument("--verify", action="store_true", help="read all, and check every sha256")


def _import_verb(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = verbs.add_parser(
        "import-checkpoint",
        help="weights of the official DINO, RichSem or detrex's DINO, as a checkpoint of ours",
        description=(
            "Read a public detector's .pth without executing it, map its weights by name, and "
            "write a detector that predicts, evaluates and fine-tunes."
        ),
    )
    parser.add_argument("file", metavar="FILE", type=Path, help="checkpoint of the public code")
    parser.add_argument(
        "--from", dest="origin", choices=ORIGINS, required=True, help="the code that wrote it"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        help="a new folder, or one NAME.safetensors (FILE's name in this folder)",
    )
    parser.add_argument(
        "--annotations",
        type=Path,
        help="LVIS or COCO json whose categories are the columns; without it, none have names",
    )
    parser.add_argument("--ema", action="store_true", help="take the averaged weights in FILE")


def _stage_verb(
    verbs: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    text: str,
) -> argparse.ArgumentParser:
    parser = verbs.add_parser(name, help=text, description=text[:1].upper() + text[1:] + ".")
    parser.add_argument("recipe", nargs="+", help="recipes in order, then overrides for all")
    return parser
