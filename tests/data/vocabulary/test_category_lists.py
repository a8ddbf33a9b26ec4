"""Categories read from whatever has some, and `longtail vocabulary`."""

import csv
import json
from functools import partial
from pathlib import Path

import pytest
from coloured_world import VOCABULARY, make_index

from pipeline.arguments import build_parser
from pipeline.cli import vocabulary
from pipeline.data.vocabulary.categories import Category, Vocabulary
from pipeline.data.vocabulary.category_lists import (
    list_csv,
    map_places,
    read_vocabulary,
    with_synsets,
)
from pipeline.errors import DataError, RecipeError

RECIPE = """
name: two
data:
  root: {root}
  shards: {root}
  train:
    - {{name: train, format: lvis, images: images, annotations: train.json}}
    - {{name: other, format: lvis, images: images, annotations: other.json}}
training: {{steps: 1, batch_size: 1}}
"""


def run(*words: str) -> None:
    vocabulary(build_parser().parse_args(["vocabulary", *words]))


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_tables_with_and_without_a_header(tmp_path: Path) -> None:
    fixed = read_vocabulary(write(tmp_path / "fix.csv", "1,Person,Person\n99,Dinning,Dining\n"))
    assert [(c.id, c.name, c.aliases) for c in fixed.categories] == [
        (1, "Person", ()),
        (99, "Dinning", ("Dining",)),
    ]
    table = "wnid\tlvis_v1_id\tlvis_name\tlvis_synset\tlvis_frequency\nn1\t7\tcat\tcat.n.01\tr\n"
    wnids = read_vocabulary(write(tmp_path / "wnid.tsv", f"{table}n2\t7\tcat\tcat.n.01\tr\n"))
    assert wnids.categories == (Category(7, "cat", "cat.n.01", "r"),)


def test_a_listing_reads_back(tmp_path: Path) -> None:
    given = Vocabulary([Category(3, "a, b", "a.n.01", "r", aliases=("c", "d")), Category(4, "e")])
    again = read_vocabulary(write(tmp_path / "list.csv", list_csv(given)))
    assert again.categories == given.categories


def test_json_shards_and_recipes(tmp_path: Path) -> None:
    entries = [{"id": 1, "name": "cat", "synset": "cat.n.01", "synonyms": ["kitty"]}]
    plain = read_vocabulary(write(tmp_path / "list.json", json.dumps(entries)))
    whole = read_vocabulary(write(tmp_path / "all.json", json.dumps({"categories": entries})))
    assert (
        plain.categories
        == whole.categories
        == (Category(1, "cat", "cat.n.01", aliases=("kitty",)),)
    )
    make_index(tmp_path, "train", VOCABULARY, [[3]])
    other = Vocabulary([Category(5, "pear")])
    make_index(tmp_path, "other", other, [])
    recipe = write(tmp_path / "two.yaml", RECIPE.format(root=tmp_path))
    assert read_vocabulary(str(tmp_path / "train")) == VOCABULARY
    assert read_vocabulary(recipe) == VOCABULARY
    assert read_vocabulary(f"{recipe}:other") == other
    with pytest.raises(RecipeError, match="has no source 'nothing'; its sources are train, other"):
        read_vocabulary(f"{recipe}:nothing")


def test_short_names_lead_into_the_root(tmp_path: Path) -> None:
    (tmp_path / "lvis").mkdir()
    with pytest.raises(RecipeError, match=r"LVIS stands for .*lvis_v1_val\.json .* --root"):
        read_vocabulary("LVIS", str(tmp_path))
    write(tmp_path / "lvis/lvis_v1_train.json", '{"categories": [{"id": 1, "name": "cat"}]}')
    assert read_vocabulary("LVIS", str(tmp_path)).names == ["cat"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "", "is empty"),
        ("a.csv", "n02084071,dog\n", "ids longtail gives, name its prepared shards"),
        ("a.csv", "1,cat\nx,dog\n", "line 2: id 'x' must be an integer"),
        ("a.csv", "id,name\n1,cat\n1,dog\n", r"id 1 is given more than once \(cat, dog\)"),
        ("a.json", "{", "not valid json"),
        ("a.json", "{}", "`categories` must be a list"),
    ],
)
def test_files_that_hold_no_categories_are_refused(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read_vocabulary(write(tmp_path / name, text))


def test_places_that_are_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="there is no such file; name an annotation json"):
        read_vocabulary(str(tmp_path / "absent.json"))
    with pytest.raises(RecipeError, match=r"is a folder without index\.json"):
        read_vocabulary(str(tmp_path))


def test_synsets_of_names(tmp_path: Path) -> None:
    coco = Vocabulary([Category(1, "Stop sign"), Category(2, "bird", "bird.n.02")])
    published = '{"stop sign": {"coco_cat_id": 13, "synset": "stop_sign.n.01"}, "bird": "x"}'
    for path in (
        write(tmp_path / "s.json", published),
        write(tmp_path / "s.csv", "name,synset\nstop_sign,stop_sign.n.01\n"),
    ):
        named = with_synsets(coco, path)
        assert [c.synset for c in named.categories] == ["stop_sign.n.01", "bird.n.02"]
    with pytest.raises(DataError, match="gives no synset for any name"):
        with_synsets(coco, write(tmp_path / "n.csv", "a,b\n1,2\n"))
    with pytest.raises(RecipeError, match="there is no such file"):
        with_synsets(coco, str(tmp_path / "absent.json"))


def test_the_verb_writes_a_csv_and_keeps_what_was_corrected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "s.csv", "1,Cat\n2,Dogs\n")
    target = write(tmp_path / "t.csv", "id,name\n5,cat\n6,dog\n")
    output = tmp_path / "map.csv"
    call = partial(run, "--map", source, target, "-o", str(output))
    call()
    shown = capsys.readouterr()
    assert shown.out == output.read_text()
    assert "2 categories to 2: 1 by name, 1 left out with candidates" in shown.err
    assert [row["how"] for row in csv.DictReader(output.open())] == ["name", "candidate"]
    call()
    output.write_text(output.read_text().replace("Dogs,,,,", "Dogs,,6,dog,"))
    corrected = output.read_text()
    with pytest.raises(RecipeError, match="perhaps corrections"):
        call()
    assert output.read_text() == corrected


def test_the_verb_lists_one_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "s.csv", "1,Cat\n")
    run(source)
    assert capsys.readouterr().out.splitlines()[1] == "1,Cat,,,,"
    run(source, "--synsets", write(tmp_path / "n.csv", "name,synset\ncat,cat.n.01\n"))
    assert capsys.readouterr().out.splitlines()[1] == "1,Cat,cat.n.01,,,"
    for words in ([], [source, "--map", source, source]):
        with pytest.raises(RecipeError, match="give one PLACE to list, or --map"):
            run(*words)


def test_real_coco_reaches_lvis_by_the_published_synsets(shared_data: Path, tmp_path: Path) -> None:
    table, counts = map_places(
        str(shared_data / "coco128/annotations/instances_train2017.json"),
        str(shared_data / "detic_metadata/lvis_v1_train_cat_info.json"),
        synsets=str(shared_data / "lvis/coco_to_synset.json"),
        output=str(tmp_path / "map.csv"),
    )
    rows = list(csv.DictReader(table.splitlines()))
    assert [row["source_name"] for row in rows if not row["target_id"]] == ["hot dog"]
    assert "80 categories to 1203: 79 by synset" in counts


def test_real_openimages_classes_have_the_ids_of_their_source(
    shared_data: Path, tmp_path: Path
) -> None:
    csv_file = shared_data / "openimages/class-descriptions-boxable.csv"
    found = read_vocabulary(str(csv_file))
    assert found.num_categories == 601
    assert (found.categories[0].id, found.names[0]) == (1, "Tortoise")
    (tmp_path / "openimages").mkdir()
    header = tmp_path / "openimages/class-descriptions-boxable.csv"
    header.write_text("LabelName,DisplayName\n" + csv_file.read_text())
    assert read_vocabulary("OpenImages", str(tmp_path)) == found


def test_real_imagenet_table_is_all_of_lvis(shared_data: Path, tmp_path: Path) -> None:
    _, counts = map_places(
        str(shared_data / "derived/imagenet_lvis_wnid_to_lvis_v1.tsv"),
        str(shared_data / "detic_metadata/lvis_v1_train_cat_info.json"),
        output=str(tmp_path / "map.csv"),
    )
    assert counts == "997 categories to 1203: 997 by synset"
