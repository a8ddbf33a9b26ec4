"""Instances of each category, sorted, of several prepared data sets on one page."""

import csv
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from tiny_world import in_line

from pipeline.data.shards.preparing import prepare_source
from pipeline.errors import DataError, RecipeError, StorageError
from pipeline.recipe import Data, Source
from pipeline.study.frequency import STYLES, frequency
from pipeline.study.output import write_outcome


def draw(root: Path, name: str, counts: dict[int, int], **changes: Any) -> Source:
    """Shards of a COCO source with so many instances of each category, two on an image."""
    (root / name).mkdir(parents=True)
    rows = [category for category, number in counts.items() for _ in range(number)]
    images, annotations = [], []
    for place in range(-(-len(rows) // 2)):
        Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(root / name / f"{place}.png")
        images.append({"id": place, "width": 40, "height": 40, "file_name": f"{place}.png"})
    for number, category in enumerate(rows):
        bbox = [number % 20, number // 20 % 20, 9, 9]
        annotations.append(
            {"id": number, "image_id": number // 2, "category_id": category, "bbox": bbox}
        )
    categories = [{"id": number, "name": f"{name}_{number}"} for number in counts]
    tree = {"images": images, "annotations": annotations, "categories": categories}
    (root / f"{name}.json").write_text(json.dumps(tree))
    tree = {"name": name, "format": "coco", "images": name, "annotations": f"{name}.json"}
    source = Source.model_validate(tree | changes)
    prepare_source(source, Data(root=str(root), train=[source]), in_line)
    return source


@pytest.fixture(scope="module")
def world(module_path: Path) -> Path:
    sources = [
        draw(module_path, "long", {1: 2, 2: 70, 3: 9, 4: 0, 5: 9}),
        draw(module_path, "flat", {7: 12, 8: 12}),
        draw(module_path, "silent", {1: 4}, use_labels=False),
    ]
    recipe = {
        "name": "three",
        "data": {
            "root": str(module_path),
            "train": [source.model_dump(mode="json") for source in sources],
        },
        "training": {"steps": 1},
    }
    (module_path / "three.yaml").write_text(yaml.safe_dump(recipe))
    return module_path


def rows_of(folder: Path) -> list[dict[str, str]]:
    (path,) = folder.glob("*.csv")
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def count(places: Sequence[object], *overrides: str) -> Any:
    return frequency([str(place) for place in places], overrides)


def test_counts_are_sorted_and_those_of_the_annotations(world: Path, tmp_path: Path) -> None:
    outcome = count([world / "shards/long", world / "shards/flat"])
    text = write_outcome(tmp_path, outcome)
    assert "long: 90 instances of 4 categories, from 70 to 2, half of them over 9" in text
    rows = rows_of(tmp_path)
    own = [row for row in rows if row["data_set"] == "long"]
    assert [(row["category_id"], row["instances"]) for row in own] == [
        ("2", "70"), ("3", "9"), ("5", "9"), ("1", "2"),
    ]  # fmt: skip
    assert Counter(row["data_set"] for row in rows) == {"long": 4, "flat": 2}
    first, second = outcome.figures["data_sets"]
    assert (first["categories"], first["with_instances"], first["images"]) == (5, 4, 45)
    assert first["up_to"] == {"1": 0, "10": 3, "100": 4}
    assert first["share_of_first_tenth"] == pytest.approx(70 / 90)
    assert (second["most"], second["least"], second["median"]) == (12, 12, 12)


def test_the_plot_has_a_line_for_each_data_set(world: Path) -> None:
    page = count([world / "shards/long", world / "shards/flat"]).page
    lines = re.findall(r'<polyline class="line (c\d)"[^>]*data-at="([^"]*)"><title>(\w+)<', page)
    assert lines[0] == ("c1", "1|70;2|9;3|9;4|2", "long")
    assert lines[1] == ("c2", "1|12;2|12", "flat")
    assert "instances (logarithmic)" in page
    assert "(logarithmic)" not in count([world / "shards/flat"]).page


def test_a_recipe_means_its_sources_with_labels(world: Path) -> None:
    outcome = count([world / "three.yaml", world / "shards/flat"])
    assert [one["name"] for one in outcome.figures["data_sets"]] == ["long", "flat"]
    assert outcome.figures["left_out"] == ["silent, whose boxes have no label"]
    assert "left out: silent, whose boxes have no label" in outcome.lines
    one = count([f"{world / 'three.yaml'}:flat"])
    assert [each["name"] for each in one.figures["data_sets"]] == ["flat"]


def test_data_sets_of_one_name_are_told_apart(world: Path, tmp_path: Path) -> None:
    draw(tmp_path, "flat", {1: 3, 2: 1})
    names = [
        one["name"]
        for one in count([world / "shards/flat", tmp_path / "shards/flat"]).figures["data_sets"]
    ]
    assert names == [str(world / "shards/flat"), str(tmp_path / "shards/flat")]


def test_what_cannot_be_counted_is_refused(world: Path) -> None:
    with pytest.raises(DataError, match=r"silent .* has no box with a label"):
        count([world / "shards/silent"])
    with pytest.raises(DataError, match="has no box with a label"):
        count([f"{world / 'three.yaml'}:silent"])
    with pytest.raises(StorageError, match="no prepared shards"):
        count([world / "shards/none"])
    with pytest.raises(StorageError, match=r"source long of .*three\.yaml: no prepared shards"):
        count([world / "three.yaml"], "data.shards=elsewhere")
    with pytest.raises(RecipeError, match="'loong' is no source of the recipe"):
        count([f"{world / 'three.yaml'}:loong"])
    with pytest.raises(RecipeError, match="belongs to a recipe"):
        count([world / "shards/long"], "data.root=x")
    with pytest.raises(RecipeError, match="no data set"):
        count([])
    assert len(set(STYLES)) == 12
