"""Maps between vocabularies: by rule, by a reviewed csv, and what of them reaches training."""

import csv
import io
import json
from pathlib import Path

import pytest
from coloured_world import VOCABULARY, make_index
from pydantic import ValidationError

from pipeline.data.stream.reader import SourceReader
from pipeline.data.vocabulary.categories import Category, Vocabulary
from pipeline.data.vocabulary.category_map import CategoryMap, map_of, match_categories, read_map
from pipeline.data.vocabulary.similar_names import forms
from pipeline.errors import DataError, RecipeError
from pipeline.recipe import Data, Source

LVIS = Vocabulary(
    [
        Category(1, "sofa", "sofa.n.01", aliases=("sofa", "couch", "lounge")),
        Category(2, "mouse_(computer_equipment)", "mouse.n.04"),
        Category(3, "television_set", "television_receiver.n.01", aliases=("TV",)),
        Category(4, "traffic_light", "traffic_light.n.01"),
        Category(5, "crane", "crane.n.04"),
        Category(6, "glove", "glove.n.02", aliases=("mitt",)),
        Category(7, "mitten", "mitten.n.01", aliases=("mitt",)),
    ]
)
O365 = Vocabulary(
    [
        Category(10, "Couch"),
        Category(11, "Mouse"),
        Category(12, "Moniter/TV"),
        Category(13, "Traffic Light"),
        Category(14, "bird", "crane.n.04"),
        Category(15, "Crane", "crane.n.05"),
        Category(16, "mitt"),
        Category(17, "Gloves"),
        Category(18, "Yak"),
    ]
)
HEADER = "source_id,source_name,target_id,target_name\n"


def rows(found: CategoryMap) -> dict[str, dict[str, str]]:
    return {row["source_name"]: row for row in csv.DictReader(io.StringIO(found.to_csv()))}


def csv_of(changes: dict[str, tuple[str, str]]) -> str:
    """A complete reviewed csv of O365, with the (target_id, target_name) of some."""
    lines = (
        f"{c.id},{c.name},{','.join(changes.get(c.name, ('', '')))}\n" for c in O365.categories
    )
    return HEADER + "".join(lines)


def test_synset_then_name_then_alias_and_nothing_else_is_applied() -> None:
    found = match_categories(O365, LVIS)
    assert found.columns.tolist() == [0, -1, -1, 3, 4, -1, -1, -1, -1]
    assert found.how == (
        "alias", "candidate", "candidate", "name", "synset",
        "candidate", "candidate", "candidate", "none",
    )  # fmt: skip
    assert found.counts == {"synset": 1, "name": 1, "alias": 1, "candidate": 5, "none": 1}
    assert found.unmapped == ["Mouse", "Moniter/TV", "Crane", "mitt", "Gloves", "Yak"]
    assert not found.is_identity


def test_candidates_are_offered_for_review() -> None:
    lines = rows(match_categories(O365, LVIS))
    assert lines["Couch"]["target_name"] == "sofa"
    assert lines["Couch"]["target_synset"] == "sofa.n.01"
    assert lines["Mouse"]["candidates"] == "2 mouse_(computer_equipment)"
    assert lines["Mouse"]["target_id"] == ""
    assert lines["Moniter/TV"]["candidates"] == "3 television_set"
    # The same word for a thing of another synset, and an alias that two categories have.
    assert lines["Crane"]["candidates"] == "5 crane"
    assert lines["mitt"]["candidates"] == "6 glove | 7 mitten"
    assert lines["Gloves"]["candidates"] == "6 glove"
    assert lines["Yak"]["candidates"] == ""


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("Slippers", "slipper_(footwear)"),
        ("Tea pot", "teapot"),
        ("Bow Tie", "bow-tie"),
        ("Cabinet/shelf", "shelf"),
        ("Cutting/chopping Board", "chopping_board"),
        ("Other Shoes", "shoe"),
        ("Knives", "knife"),
        ("Gloves", "glove"),
        ("Cookies", "cookie"),
        ("Boxes", "box"),
        ("Cherries", "cherry"),
        ("Tomatoes", "tomato"),
        ("Wine Glasses", "wineglass"),
        ("Buses", "bus"),
    ],
)
def test_spellings_that_mean_the_same_have_a_form_in_common(name: str, other: str) -> None:
    assert set(forms(name)) & set(forms(other))


@pytest.mark.parametrize(("name", "other"), [("can", "cane"), ("car", "care"), ("glass", "gla")])
def test_spellings_that_do_not(name: str, other: str) -> None:
    assert not set(forms(name)) & set(forms(other))


def test_one_vocabulary_is_itself_even_with_a_name_twice() -> None:
    twice = Vocabulary([Category(1, "cup"), Category(2, "Cup")])
    found = match_categories(twice, Vocabulary(twice.categories))
    assert found.is_identity
    assert found.columns.tolist() == [0, 1]
    assert found.counts == {"same": 2}


def test_two_categories_may_become_one_and_a_synset_of_two_needs_the_name() -> None:
    found = match_categories(
        Vocabulary([Category(1, "sofa"), Category(2, "couch"), Category(3, "ball", "ball.n.01")]),
        Vocabulary(
            [
                *LVIS.categories[:1],
                Category(8, "ball", "ball.n.01"),
                Category(9, "beach ball", "ball.n.01"),
            ]
        ),
    )
    assert found.columns.tolist() == [0, 0, 1]


def test_what_is_written_is_read_as_the_same_map() -> None:
    found = match_categories(O365, LVIS)
    again = read_map("m.csv", found.to_csv().encode(), O365, LVIS)
    assert again.columns.tolist() == found.columns.tolist()
    assert again.digest == found.digest
    assert again.counts == {"reviewed": 3, "none": 6}
    assert "by m.csv: 3 as reviewed, 6 left out" in again.describe()
    # As a spreadsheet saves it: a byte order mark, other line ends, only the needed columns.
    plain = csv_of({"Mouse": ("2", "Mouse (computer equipment)"), "Yak": ("5", "crane")})
    other = read_map("m.csv", b"\xef\xbb\xbf" + plain.replace("\n", "\r\n").encode(), O365, LVIS)
    assert other.columns.tolist() == [-1, 1, -1, -1, -1, -1, -1, -1, 4]
    assert other.digest != found.digest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,name\n", "header lacks source_id, source_name, target_id, target_name"),
        (csv_of({}) + "18,Yak,,\n", r"line 11: source_id 18 \(Yak\) is on line 10 already"),
        (csv_of({}).replace("18,Yak,,\n", ""), r"no line for 1 of .* 9 categories \(18 Yak\)"),
        (csv_of({}).replace("18,Yak", "19,Yak"), "line 10: source_id: category id 19 is none"),
        (csv_of({}).replace("18,Yak", "18,Ox"), "source_id 18 is 'Yak', and source_name says 'Ox'"),
        (csv_of({}).replace("18,Yak", ",Yak"), "source_name is 'Yak' but source_id is empty"),
        (csv_of({}) + ",,1,sofa\n", "line 11: source_id is empty"),
        (csv_of({"Yak": ("99", "yak")}), "line 10: target_id: category id 99 is none of the 7"),
        (csv_of({"Yak": ("1", "crane")}), "target_id 1 is 'sofa', and target_name says 'crane'"),
        (csv_of({"Yak": ("1", "")}), "target_id 1 is 'sofa', and target_name says ''"),
        (csv_of({"Yak": ("-1", "sofa")}), "target_id '-1' must be an integer"),
        (csv_of({"Yak": ("", "crane")}), "target_name is 'crane' but target_id is empty"),
    ],
)
def test_a_csv_that_fits_no_longer_is_refused_by_line_and_value(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_map("m.csv", text.encode(), O365, LVIS)


def test_text_in_another_encoding_is_refused() -> None:
    with pytest.raises(DataError, match="not UTF-8"):
        read_map("m.csv", "source_id\n\u00e9".encode("latin-1"), O365, LVIS)


def test_training_uses_the_csv_of_the_recipe(tmp_path: Path) -> None:
    theirs = Vocabulary([Category(1, "leaf"), Category(2, "Apples"), Category(3, "sun")])
    source = Source(name="other", format="lvis", images="i", annotations="a.json")
    index = make_index(tmp_path, "validation", theirs, [])
    plain = SourceReader(source, index, VOCABULARY)
    assert plain.category_map is not None
    assert plain.columns([1, 2, 3]).tolist() == [1, -1, -1]
    table = plain.category_map.to_csv()
    assert "2,Apples,,,,,candidate,3 apple" in table
    (tmp_path / "map.csv").write_text(table.replace("Apples,,,,", "Apples,,3,apple,"))
    reviewed = source.model_copy(update={"category_map": "map.csv"})
    reader = SourceReader(reviewed, index, VOCABULARY, str(tmp_path))
    assert reader.columns([1, 2, 3, 4]).tolist() == [1, 0, -1, -1]
    assert reader.category_map is not None
    assert reader.category_map.digest != plain.category_map.digest
    # What is written beside a run is the map in use, and reads back as it.
    assert map_of(reviewed, theirs, VOCABULARY, str(tmp_path)).columns.tolist() == [1, 0, -1]
    assert reader.digest != plain.digest and reader.digest.startswith(index.digest)
    with pytest.raises(RecipeError, match=r"`category_map` 'map.csv' is no file at"):
        SourceReader(reviewed, index, VOCABULARY, str(tmp_path / "elsewhere"))


@pytest.mark.parametrize(
    ("place", "changes", "message"),
    [
        ("train", {}, "has them already"),
        ("validation", {}, "has them already"),
        ("extra", {"use_labels": False}, "its labels are not used"),
    ],
)
def test_a_map_where_there_is_nothing_to_map_is_refused(
    place: str, changes: dict[str, bool], message: str
) -> None:
    def source(name: str) -> dict[str, object]:
        own = {"category_map": "m.csv", **changes} if name == place else {}
        return {"name": name, "format": "lvis", "images": "i", "annotations": "a", **own}

    tree = {
        "root": ".",
        "train": [source("train")],
        "extra": [source("extra")],
        "validation": source("validation"),
    }
    with pytest.raises(ValidationError, match=message):
        Data.model_validate(tree)


def lvis_v1(data: Path) -> Vocabulary:
    tree = json.loads((data / "detic_metadata/lvis_v1_train_cat_info.json").read_text())
    return Vocabulary(
        [Category(c["id"], c["name"], c["synset"], aliases=tuple(c["synonyms"])) for c in tree]
    )


def test_lvis_v05_reaches_v1_by_synset(shared_data: Path) -> None:
    tree = json.loads((shared_data / "lvis/lvis_val_100.json").read_text())["categories"]
    old = Vocabulary([Category(c["id"], c["name"], c["synset"]) for c in tree])
    found = match_categories(old, lvis_v1(shared_data))
    assert found.counts["synset"] == 1151
    assert sum(found.counts.values()) == 1230
    assert (found.columns >= 0).sum() == 1151
    assert len(set(found.columns[found.columns >= 0].tolist())) == 1151


def test_objects365_reaches_lvis_by_name(shared_data: Path) -> None:
    with (shared_data / "detic_metadata/Objects365_names_fix.csv").open(encoding="utf-8") as file:
        theirs = Vocabulary([Category(int(row[0]), row[2]) for row in csv.reader(file)])
    found = match_categories(theirs, lvis_v1(shared_data))
    assert found.counts == {"name": 177, "alias": 21, "candidate": 99, "none": 68}
    applied = found.columns[found.columns >= 0].tolist()
    assert len(set(applied)) == len(applied) == 198
    lines = rows(found)
    for name, target in (
        ("Couch", "sofa"), ("Donut", "doughnut"), ("Fire Hydrant", "fireplug"), ("Pig", "hog")
    ):  # fmt: skip
        assert (lines[name]["target_name"], lines[name]["how"]) == (target, "alias")
    assert lines["Car"]["candidates"] == "207 car_(automobile)"
    assert lines["Mouse"]["candidates"] == "705 mouse_(computer_equipment)"
    assert lines["Street Lights"]["candidates"] == "1027 streetlight"
