"""The miniature world's Objects365 once more: in the forms of other data sets, and with the names
of its LVIS.

In other forms it is in two parts; images whose number is divisible by four are for validation.
"""

import csv
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

DRAWN = "objects365/zhiyuan_objv2_train.json"
PARTS: dict[str, Callable[[int], bool]] = {
    "train": lambda number: number % 4 != 0,
    "validation": lambda number: number % 4 == 0,
}
BOX_COLUMNS = ("ImageID", "LabelName", "XMin", "XMax", "YMin", "YMax", "IsGroupOf")

OPENIMAGES = {
    part: {
        "name": f"openimages_{part}",
        "format": "openimages",
        "images": "openimages",
        "annotations": f"openimages/{part}-annotations-bbox.csv",
        "files": {"classes": "openimages/class-descriptions-boxable.csv"},
    }
    for part in PARTS
}
VISUAL_GENOME = {
    part: {
        "name": f"visual_genome_{part}",
        "format": "visual_genome",
        "images": "visual_genome",
        "annotations": f"visual_genome/objects_{part}.json",
        "files": {"image_data": "visual_genome/image_data.json"},
        **({"min_instances": 1} if part == "train" else {}),
    }
    for part in PARTS
}


def as_openimages(raw: Path) -> None:
    """csv files of fractions; the first box of each image is one around a group."""
    tree, folder = _read(raw), raw / "openimages"
    _copy(raw, tree, lambda image: folder / f"{image['id']:016x}.jpg")
    names = {category["id"]: f"/m/{category['id']:04d}" for category in tree["categories"]}
    _write_rows(
        folder / "class-descriptions-boxable.csv",
        ([names[category["id"]], category["name"]] for category in tree["categories"]),
    )
    for part, holds in PARTS.items():
        rows: list[list[object]] = []
        for image, boxes in _images(tree, holds):
            for k, box in enumerate(boxes):
                x, y, w, h = box["bbox"]
                across, down = (x, x + w), (y, y + h)
                fractions = [side / image["width"] for side in across]
                fractions += [side / image["height"] for side in down]
                rows.append(
                    [f"{image['id']:016x}", names[box["category_id"]], *fractions, int(k == 0)]
                )
        _write_rows(folder / f"{part}-annotations-bbox.csv", [BOX_COLUMNS, *rows])


def as_visual_genome(raw: Path) -> None:
    """objects.json of each part, with one image_data.json."""
    tree, folder = _read(raw), raw / "visual_genome"
    _copy(raw, tree, lambda image: folder / "VG_100K" / f"{image['id']}.jpg")
    names = {category["id"]: category["name"] for category in tree["categories"]}
    (folder / "image_data.json").write_text(
        json.dumps(
            [
                {
                    "image_id": image["id"],
                    "width": image["width"],
                    "height": image["height"],
                    "url": f"https://example.org/VG_100K/{image['id']}.jpg",
                }
                for image in tree["images"]
            ]
        )
    )
    for part, holds in PARTS.items():
        entries = [
            {
                "image_id": image["id"],
                "objects": [
                    {"object_id": box["id"], "names": [names[box["category_id"]]], "synsets": []}
                    | dict(zip("xywh", box["bbox"], strict=True))
                    for box in boxes
                ],
            }
            for image, boxes in _images(tree, holds)
        ]
        (folder / f"objects_{part}.json").write_text(json.dumps(entries))


def name_as_in_lvis(raw: Path) -> None:
    """Give Objects365 categories of LVIS: those of the miniature world have nothing in common."""
    lvis = json.loads((raw / "annotations/lvis_v1_train.json").read_text())
    document = _read(raw)
    for category, other in zip(document["categories"], lvis["categories"], strict=False):
        category["name"] = other["name"]
    (raw / DRAWN).write_text(json.dumps(document))


def _read(raw: Path) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads((raw / DRAWN).read_text())
    return tree


def _images(tree: dict[str, Any], holds: Callable[[int], bool]) -> list[tuple[dict, list[dict]]]:
    """Images of one part, each with its boxes."""
    return [
        (image, [box for box in tree["annotations"] if box["image_id"] == image["id"]])
        for image in tree["images"]
        if holds(image["id"])
    ]


def _copy(raw: Path, tree: dict[str, Any], place: Callable[[dict], Path]) -> None:
    for image in tree["images"]:
        place(image).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(raw / "objects365" / image["file_name"], place(image))


def _write_rows(path: Path, rows: Iterable[Iterable[object]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
