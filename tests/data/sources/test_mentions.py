"""Categories named by captions: the rules, and Detic's tags as an independent reference."""

import json
import re
from pathlib import Path

import pytest
from raw_data import write

from pipeline.data.sources.mentions import CategoryFinder, read_finder
from pipeline.data.vocabulary.categories import Category, Vocabulary
from pipeline.errors import DataError, RecipeError
from pipeline.recipe import Source

WORDS = Vocabulary(
    [
        Category(1, "dog", aliases=("dog", "domestic_dog")),
        Category(2, "hot_dog"),
        Category(3, "bow_(weapon)"),
        Category(4, "bow_(decorative_ribbons)", aliases=("bow_(decorative_ribbons)", "ribbon")),
        Category(5, "wineglass", aliases=("wine glass",)),
        Category(6, "glass_(drink_container)"),
        Category(7, "spectacles", aliases=("spectacles", "glasses")),
        Category(8, "T-shirt"),
        Category(9, "Handbag/Satchel"),
        Category(10, "knife"),
        Category(11, "berry"),
        Category(12, "person", aliases=("woman", "child", "snowman")),
        Category(13, "fox"),
        Category(14, "tomato"),
        Category(15, "shelf"),
        Category(16, "toy"),
        Category(17, "tobacco_pipe"),
        Category(18, "écharpe"),
        Category(19, "person's_bag"),
    ]
)


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a dog", [1]),
        ("A Dog.", [1]),
        ("DOGS everywhere", [1]),
        ("domestic dogs", [1]),
        ("a dogma, a hotdog and an underdog", []),
        ("a hot dog", [2]),
        ("a hot-dog stand", [2]),
        ("hot dogs and a dog", [1, 2]),
        ("it is hot, dog!", [1]),
        ("it is hot . dog", [1]),
        ("the dog's bone", [1]),
        ("the dog\u2019s bone", [1]),
        ("a red bow", [3, 4]),
        ("bow (weapon)", [3, 4]),
        ("ribbons", [4]),
        ("a glass", [6]),
        ("a pair of glasses", [7]),
        ("wine glasses", [5]),
        ("a wine glass and a glass", [5, 6]),
        ("t-shirts and a t shirt", [8]),
        ("a satchel", [9]),
        ("handbag/satchel", [9]),
        ("knives, berries, foxes, tomatoes, shelves, toys", [10, 11, 13, 14, 15, 16]),
        ("toies and berrys and womans", []),
        ("women with children, two people and snowmen", [12]),
        ("photo by <PERSON>", []),
        ("photo of <PERSON> 's dog", [1]),
        ("tobacco", []),
        ("a tobacco pipe", [17]),
        ("deux ÉCHARPES", [18]),
        ("a person's bag", [19]),
        ("dog_dog", [1]),
        ("", []),
        ("\u2028 \x00", []),
    ],
)
def test_names_are_found_as_whole_words(caption: str, expected: list[int]) -> None:
    assert CategoryFinder(WORDS).find(caption) == expected


def test_a_phrase_at_the_end_needs_all_its_words() -> None:
    finder = CategoryFinder(Vocabulary([Category(1, "dog"), Category(2, "dog_house_roof")]))
    assert finder.find("a dog house") == [1]
    assert finder.find("a dog house roof") == [2]
    assert finder.find("dog") == [1]


def names_of_detic(categories: list[dict]) -> dict[int, list[str]]:
    """Detic's rule as its paper's code has it: names between spaces, qualifiers cut off."""
    return {
        category["id"]: [
            f" {re.sub(r'[(].*', '', name.replace('_', ' ')).lower().strip()} "
            for name in category["synonyms"]
        ]
        for category in categories
    }


def by_detic(caption: str, names: dict[int, list[str]]) -> set[int]:
    padded = f" {caption.lower()} "
    return {k for k, some in names.items() if any(name in padded for name in some)}


def test_tags_are_those_of_detic_but_for_plurals_and_longer_names(shared_data: Path) -> None:
    path = shared_data / "detic_metadata" / "lvis_v1_train_cat_info.json"
    categories = json.loads(path.read_text())
    source = Source.model_validate(
        {"name": "x", "format": "cc3m", "images": "i", "files": {"classes": str(path)}}
    )
    finder = read_finder(source, "")
    assert finder is not None and finder.vocabulary.num_categories == 1203
    table = shared_data / "conceptual_captions" / "Validation_GCC-1.1.0-Validation.tsv"
    captions = [line.split("\t")[0] for line in table.read_text().split("\n") if line]
    names = {
        category["id"]: [
            spelled(name.split("(")[0]).strip()
            for name in (category["name"], *category["synonyms"])
        ]
        for category in categories
    }
    detic = names_of_detic(categories)
    same = more = fewer = 0
    for caption in captions[:1000]:
        ours, theirs = set(finder.find(caption)), by_detic(caption, detic)
        same += ours == theirs
        more += len(ours - theirs)
        fewer += len(theirs - ours)
        for number in theirs - ours:
            # What Detic has beyond ours is a part of a longer name that we found.
            words = spelled(caption)
            longer = [f" {name} " for k in ours for name in names[k] if f" {name}" in words]
            assert any(f" {name} " in long for long in longer for name in names[number]), caption
        for number in ours - theirs:
            # What we have beyond Detic's is a plural, a name beside a sign, or the name `bull`,
            # which is none of that category's synonyms.
            words = spelled(caption)
            stems = [name[:-2] if len(name) > 3 else name for name in names[number]]
            irregular = re.search(r" (people|\w*men|children|mice|geese|feet|teeth) ", words)
            assert irregular or any(f" {stem}" in words for stem in stems), caption
    # Figures of this code on these captions; the two rules above are what they stand for.
    assert (same, more, fewer) == (867, 129, 24)


def spelled(text: str) -> str:
    """Words between single spaces, signs left out."""
    return f" {' '.join(re.findall(r'[a-z0-9]+', text.lower()))} "


def finder_of(root: Path, content: object) -> CategoryFinder | None:
    write(root / "classes.json", content)
    source = Source.model_validate(
        {"name": "x", "format": "cc3m", "images": "i", "files": {"classes": "classes.json"}}
    )
    return read_finder(source, str(root))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid json"),
        ({"images": []}, "`categories` must be a list"),
        ([], "has no categories to look for"),
        ([{"id": "x", "name": "dog"}], "id 'x' must be an integer"),
        ([{"id": 1, "name": "dog", "aliases": [], "colour": 3}], "is not a category"),
        ([3], "must be a list of objects"),
    ],
)
def test_classes_of_another_form_are_refused(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        finder_of(tmp_path, content)


def test_classes_that_are_absent_are_a_recipe_error(tmp_path: Path) -> None:
    source = Source.model_validate(
        {"name": "x", "format": "cc3m", "images": "i", "files": {"classes": "absent.json"}}
    )
    with pytest.raises(RecipeError, match=r"`files\.classes` 'absent\.json' is no file at"):
        read_finder(source, str(tmp_path))
