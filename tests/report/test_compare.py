"""Runs side by side: right differences, and none where they would mean nothing."""

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from drawn_runs import SOURCE, log_evaluation, write_evaluation, write_metrics, write_recipe
from page_reader import read_page

from pipeline.arguments import build_parser
from pipeline.cli import report
from pipeline.errors import DataError, RecipeError, StorageError
from pipeline.recipe_file import load_recipe, recipe_from_tree
from pipeline.report.compare import write_comparison
from pipeline.report.compare_recipes import recipe_differences
from pipeline.report.compared import read_runs

MINUS = "\u2212"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    paths = [root / "richsem", root / "baseline"]
    write_recipe(paths[0], 60)
    write_recipe(paths[1], 40, semantic=None, training={"steps": 40, "learning_rate": 2e-4})
    for path, steps, skill in zip(paths, (60, 40), (0.9, 0.4), strict=True):
        write_metrics(path, steps, steps)
        write_evaluation(path, steps // 2, skill / 2, seed=steps)
        write_evaluation(path, steps, skill, seed=steps)
    return paths


def results_of(run_dir: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((run_dir / "results.json").read_text())
    return loaded


def signed(value: float) -> str:
    return f"{'+' if value > 0 else MINUS}{abs(value):.3f}"


def rows_of(source: str, heading: str) -> list[list[str]]:
    table = source[source.index(f"<h2>{heading}") :].split("</table></div>")[0]
    table = re.sub(r"<(?:wbr)>", "", table)
    rows = re.findall(r"<tr>(.*?)</tr>", table)
    return [
        [re.sub(r"<[^>]*>", " ", cell).strip() for cell in re.findall(r"<t[dh]>(.*?)</t[dh]>", row)]
        for row in rows
    ]


def test_figures_and_their_differences(runs: list[Path], tmp_path: Path) -> None:
    path = write_comparison(runs, tmp_path / "comparison.html")
    source, _ = read_page(path)
    first, other = results_of(runs[0]), results_of(runs[1])
    head, reference, compared = rows_of(source, "Runs")
    assert head[2:] == ["AP", "AP50", "APr", "APc", "APf", "steps", "samples", "time in steps"]
    assert (reference[0], compared[0]) == ("richsem", "baseline")
    for place, key in enumerate(head[2:7], start=2):
        assert reference[place] == f"{first[key]:.3f}"
        assert compared[place].split() == [f"{other[key]:.3f}", signed(other[key] - first[key])]
    assert (reference[7:] == ["60", "960", "2 min"] and compared[7:] == ["40", "640", "96 s"]) or (
        compared[7:] == ["40", "640", "2 min"]
    )
    assert "semantic" in compared[1] and "training.learning_rate" in compared[1]


def test_curves_of_both_runs_lie_over_each_other(runs: list[Path], tmp_path: Path) -> None:
    source, text = read_page(write_comparison(runs, tmp_path / "c.html"))
    for heading in ("AP, all categories", "APr, rare categories", "Total loss"):
        assert heading in text
    chart = source[source.index("APr, rare categories over steps") :].split("</svg>")[0]
    lines = re.findall(r'<polyline class="line (c\d)" [^>]*data-at="([^"]*)"', chart)
    assert [style for style, _ in lines] == ["c1", "c2"]
    assert [word.split("|")[0] for word in lines[1][1].split(";")] == ["20", "40"]
    assert lines[0][1].split(";")[1] == f"60|{results_of(runs[0])['APr']:.4g}"


def test_categories_that_gained_and_lost(runs: list[Path], tmp_path: Path) -> None:
    source, _ = read_page(write_comparison(runs, tmp_path / "c.html"))
    tables = []
    for path, step in zip(runs, (60, 40), strict=True):
        file = path / "evaluations" / f"step_{step:08d}" / "per_category.csv"
        with file.open(newline="") as lines:
            tables.append({row["name"]: row for row in csv.DictReader(lines) if row["AP"]})
    differences = {
        name: float(row["AP"]) - float(tables[0][name]["AP"])
        for name, row in tables[1].items()
        if name in tables[0]
    }
    rare = [d for name, d in differences.items() if tables[1][name]["frequency"] == "r"]
    lost = sorted(value for value in rare if value < 0)[:20]
    part = source[source.index("Lost most, rare categories") :].split("</table>")[0]
    shown = re.findall(rf'<span class="(?:loss|same)">([+{MINUS}\u00b1][\d.]+)</span>', part)
    expected = [signed(value) if value <= -0.0005 else f"\u00b1{-value:.3f}" for value in lost]
    assert shown == expected and len(shown) > 3
    summary = rows_of(source, "Categories: baseline against richsem")
    counts = [len(rare), sum(d > 0 for d in rare), sum(d < 0 for d in rare)]
    assert summary[1][:4] == ["rare", *(str(number) for number in counts)]
    assert source.count('<path class="mark') == len(differences) + 3  # and three in the legend


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"protocol": "COCO box AP, 30 images"}, 'the protocol is "COCO box AP, 30 images"'),
        ({"counts": {"images": 29}}, "evaluated on 29 images, the first on 30"),
        ({"counts": {"instances": 7}}, "evaluated on 7 boxes, the first on 120"),
        ({"protocol": None}, "the protocol of this run is not recorded"),
        ({"subset": "10 of 30 images"}, "evaluated on 10 of 30 images, the first on all images"),
    ],
)
def test_what_is_not_comparable_is_said_and_not_subtracted(
    runs: list[Path], tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    other = tmp_path / "other"
    write_recipe(other, 60)
    write_evaluation(other, 60, 0.5)
    folder = other / "evaluations" / "step_00000060"
    results = json.loads((folder / "results.json").read_text())
    counts = results["counts"] | change.pop("counts", {})
    (folder / "results.json").write_text(json.dumps(results | change | {"counts": counts}))
    source, text = read_page(write_comparison([runs[0], other], tmp_path / "c.html"))
    assert "is not comparable with the first run" in text and words in text
    figures = rows_of(source, "Runs")[2][2:7]
    assert all(re.fullmatch(r"\d\.\d{3} +\u2013", cell) for cell in figures)
    assert not re.search(r'class="(gain|loss)"', source)
    assert "two runs are not comparable" in text and "Lost most" not in text
    assert 'class="dot c2 hollow"' in source


def test_the_same_protocol_with_fewer_detections_given_is_comparable(tmp_path: Path) -> None:
    paths = [tmp_path / "one", tmp_path / "two"]
    for path, most in zip(paths, (4, 77), strict=True):
        write_evaluation(path, 5, 0.5)
        file = path / "evaluations" / "step_00000005" / "results.json"
        sentence = f"LVIS box AP, top 300 (at most {most} per image were given), 30 images"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"protocol": sentence}))
    assert read_runs(paths)[1].obstacles == []


def test_as_many_other_images_are_not_the_same_images(tmp_path: Path) -> None:
    paths = [tmp_path / "one", tmp_path / "two", tmp_path / "three"]
    for path, digest in zip(paths, ("00ab", "00ab", "11cd"), strict=True):
        write_evaluation(path, 5, 0.5)
        file = path / "evaluations" / "step_00000005" / "results.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"ground_truth": digest}))
    _, same, another = read_runs(paths)
    assert same.obstacles == []
    assert another.obstacles == [
        "evaluated on other images or annotations than the first, as many of them"
    ]


def test_runs_that_were_not_evaluated_and_runs_without_recipe(tmp_path: Path) -> None:
    write_recipe(tmp_path / "a", 60)
    write_metrics(tmp_path / "a", 30, 60)
    write_evaluation(tmp_path / "b", 30, 0.5)
    _, text = read_page(write_comparison([tmp_path / "a", tmp_path / "b"], tmp_path / "c.html"))
    assert "the first run was not evaluated" in text and "recipe could not be read" in text


def test_labels_tell_runs_of_one_name_apart(tmp_path: Path) -> None:
    paths = [tmp_path / seed / "runs" / "quickstart" for seed in ("seed0", "seed1")]
    for path in paths:
        write_recipe(path, 10)
    labels = [one.label for one in read_runs([*paths, paths[1]])]
    expected = ["seed0/runs/quickstart", "seed1/runs/quickstart"]
    assert labels == [*expected, "seed1/runs/quickstart (2)"]
    assert [one.label for one in read_runs(paths)] == expected
    moved = paths[0].rename(tmp_path / "baseline")
    assert [one.label for one in read_runs([moved, paths[1]])] == ["baseline", "quickstart"]


def test_more_runs_than_there_are_colours_are_numbered(tmp_path: Path) -> None:
    paths = [tmp_path / f"run_{place:02}" for place in range(14)]
    for path in paths:
        write_recipe(path, 10)
    compared = read_runs(paths)
    assert len({one.style for one in compared}) == 12
    assert [one.label for one in compared[::12]] == ["1. run_00", "13. run_12"]
    _, text = read_page(write_comparison(paths, tmp_path / "c.html"))
    assert "Colours and dashes repeat after 12 runs" in text
    assert next(one.label for one in read_runs(paths[:12])) == "run_00"
    _, text = read_page(write_comparison(paths[:12], tmp_path / "c.html"))
    assert "repeat" not in text


def test_a_legend_names_only_runs_with_a_line(tmp_path: Path) -> None:
    paths = [tmp_path / "with", tmp_path / "without"]
    for path, more in zip(paths, ({}, {"APr": None}), strict=True):
        write_recipe(path, 10)
        log_evaluation(path, 5, 0.2, **more)
    source, _ = read_page(write_comparison(paths, tmp_path / "c.html"))
    expected = {"APr, rare": ["with"], "APc, common": ["with", "without"]}
    for title, labels in expected.items():
        shown = source[source.index(f"<figcaption>{title} categories<") :].split("</ul>")[0]
        assert re.findall("</svg>([^<]*)</li>", shown) == labels


def recipe(**sections: Any) -> Any:
    tree = {"name": "a", "data": {"root": "d", "train": [SOURCE]}, "training": {"steps": 9}}
    return recipe_from_tree(tree | sections, "test")


def test_recipe_differences_name_the_place_and_both_values() -> None:
    other = SOURCE | {"name": "objects", "use_labels": False}
    changed = recipe(
        name="b",
        description="other words",
        data={"root": "d", "train": [SOURCE | {"weight": 2.0}], "extra": [other]},
        semantic=None,
        training={"steps": 9, "precision": "bfloat16", "drop_steps": [5]},
    )
    assert recipe_differences(recipe(), recipe(name="b", output="elsewhere")) == []
    found = {place: values for place, *values in recipe_differences(recipe(), changed)}
    assert list(found) == [
        "data.train.lvis.weight",
        "data.extra.objects",
        "semantic",
        "training.drop_steps",
        "training.precision",
    ]
    assert found["data.train.lvis.weight"] == ["1.0", "2.0"]
    assert found["training.precision"] == ["float32", "bfloat16"]
    before, after = found["semantic"]
    assert before.startswith("weight 0.5, denoising true, objective logits") and after == "none"
    assert found["data.extra.objects"][0] == "absent"
    assert found["training.drop_steps"] == ["[]", "[5]"]


def longtail(*words: object) -> None:
    arguments = build_parser().parse_args(["report", *map(str, words)])
    report(arguments)


def test_the_verb_takes_runs_and_recipes(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    longtail(runs[0])
    assert capsys.readouterr().out.strip() == str(runs[0] / "report.html")
    assert not (tmp_path / "comparison.html").exists()
    longtail(*runs)
    assert capsys.readouterr().out.strip() == "comparison.html"
    read_page(tmp_path / "comparison.html")
    (tmp_path / "recipe.yaml").write_text(load_recipe(runs[1] / "recipe.yaml").to_yaml())
    out = tmp_path / "new" / "both.html"
    longtail(runs[0], "recipe.yaml", f"output={runs[1].parent}", "-o", out)
    assert capsys.readouterr().out.strip() == str(out)
    assert "baseline" in read_page(out)[1]
    (runs[0] / "report.html").unlink()
    longtail(runs[0], "-o", "one.html")
    assert capsys.readouterr().out.strip() == "one.html"
    source, text = read_page(tmp_path / "one.html")
    assert "Comparison" not in text and "The complete recipe" in text and "<h1>richsem" in source
    assert not (runs[0] / "report.html").exists()


def test_the_verb_tells_paths_with_an_equals_sign_from_overrides(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    place = Path("lr=1e-4")
    place.mkdir()
    (place / "r.yaml").write_text(load_recipe(runs[1] / "recipe.yaml").to_yaml())
    longtail(place / "r.yaml", f"output={runs[1].parent}", "-o", "a.html")
    assert "<h1>baseline" in read_page(tmp_path / "a.html")[0]
    shutil.copytree(runs[1], "seed=1")
    longtail("seed=1", "-o", "b.html")
    assert "<h1>baseline" in read_page(tmp_path / "b.html")[0]
    with pytest.raises(RecipeError, match="runs/seed=1 is neither a run directory nor a recipe"):
        longtail("runs/seed=1")


def test_the_verb_refuses_what_it_cannot_do(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="neither a run directory nor a recipe"):
        longtail(runs[0], tmp_path / "nothing")
    with pytest.raises(RecipeError, match="no run given"):
        longtail("seed=1")
    with pytest.raises(DataError, match="neither recipe"):
        longtail(runs[0], tmp_path)
    with pytest.raises(StorageError, match="is a folder"):
        longtail(*runs, "-o", tmp_path)
