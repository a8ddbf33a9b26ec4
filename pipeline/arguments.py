"""The words of the command line: verbs, recipes, `section.key=value` overrides, and options."""

import argparse
from pathlib import Path

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
    _stage_verb(verbs, "run", "prepare, train, evaluate and report, one stage per recipe")
    _stage_verb(verbs, "prepare", "write the tar shards and indexes of the recipes' data")
    _stage_verb(verbs, "train", "train only; shards and teacher must be there")
    _stage_verb(verbs, "check", "refuse what cannot work, before anything is spent")
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
    return parser


def _stage_verb(
    verbs: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    text: str,
) -> None:
    parser = verbs.add_parser(name, help=text, description=text[:1].upper() + text[1:] + ".")
    parser.add_argument("recipe", nargs="+", help="recipes in order, then overrides for all")
