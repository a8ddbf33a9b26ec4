import pickle

import pytest

from pipeline.data.vocabulary.categories import Category, Vocabulary, clean_name
from pipeline.errors import DataError

ANIMALS = Vocabulary(
    [
        Category(7, "cat", "cat.n.01", "f", 1000, 2000, ("cat", "kitty")),
        Category(2, "bat_(animal)", "bat.n.01", "r", 3, 4),
        Category(5, "bow_(weapon)", "bow.n.04", "c"),
    ]
)


def test_columns_follow_ascending_ids() -> None:
    assert ANIMALS.ids == [2, 5, 7]
    assert ANIMALS.names == ["bat_(animal)", "bow_(weapon)", "cat"]
    assert ANIMALS.frequencies == ["r", "c", "f"]
    assert [ANIMALS.column_of(number) for number in (2, 5, 7)] == [0, 1, 2]
    assert ANIMALS.num_categories == 3


def test_unknown_id_names_the_nearest_category() -> None:
    with pytest.raises(DataError, match=r"category id 8 .* nearest known id is 7 \(cat\)"):
        ANIMALS.column_of(8)
    with pytest.raises(DataError, match="there are no categories"):
        Vocabulary([]).column_of(0)


@pytest.mark.parametrize(
    ("categories", "message"),
    [
        ([Category(1, "cat"), Category(1, "dog")], r"id 1 is given more than once \(cat, dog\)"),
        ([Category(-1, "cat")], "negative"),
        ([Category(1, " _ ")], "has no name"),
        ([Category(1, "cat", frequency="x")], "frequency 'x' must be r, c or f"),  # type: ignore
    ],
)
def test_bad_categories_are_refused(categories: list[Category], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Vocabulary(categories)


def test_json_and_pickle_give_the_same_vocabulary() -> None:
    for copy in (
        Vocabulary.from_json(ANIMALS.to_json()),
        pickle.loads(pickle.dumps(ANIMALS)),
    ):
        assert copy == ANIMALS
        assert copy.categories == ANIMALS.categories
        assert copy.column_of(7) == 2


@pytest.mark.parametrize(
    "tree",
    [{"id": 1}, [3], [{"id": 1}], [{"id": "1", "name": "cat"}], [{"id": 1, "name": "c", "x": 0}]],
)
def test_damaged_json_is_refused(tree: object) -> None:
    with pytest.raises(DataError):
        Vocabulary.from_json(tree)


def test_digest_follows_ids_names_and_synsets_alone() -> None:
    def digest(**changes: object) -> str:
        fields: dict[str, object] = {"id": 1, "name": "cat", "synset": "cat.n.01"}
        return Vocabulary([Category(**{**fields, **changes})]).digest  # type: ignore[arg-type]

    assert len(digest()) == 16
    assert digest(image_count=5, frequency="r") == digest()
    assert len({digest(), digest(id=2), digest(name="dog"), digest(synset="cat.n.02")}) == 4


def test_columns_from_prefers_synsets_then_unambiguous_clean_names() -> None:
    ours = Vocabulary(
        [
            Category(1, "crane_(bird)", "crane.n.05"),
            Category(2, "traffic_light", "traffic_light.n.01"),
            Category(3, "Cup"),
            Category(4, "cup"),
            Category(5, "ring", "ring.n.08"),
        ]
    )
    other = Vocabulary(
        [
            Category(10, "wader", "crane.n.05"),  # same synset under another name
            Category(11, "Traffic  Light"),  # no synset: same name
            Category(12, "cup"),  # two of ours have that name
            Category(13, "ring", "ring.n.02"),  # the same word for another thing
            Category(14, "zebra"),
        ]
    )
    assert ours.columns_from(other).tolist() == [0, 1, -1, -1, -1]
    assert ANIMALS.columns_from(ANIMALS).tolist() == [0, 1, 2]
    assert ANIMALS.columns_from(Vocabulary([])).shape == (0,)


def test_difference_names_what_each_side_lacks() -> None:
    other = Vocabulary([*ANIMALS.categories[:2], Category(9, "dog")])
    text = ANIMALS.difference(other)
    assert "only in the first: 7 cat (cat.n.01)" in text
    assert "only in the second: 9 dog" in text
    many = Vocabulary([Category(i, f"thing {i}") for i in range(30)])
    assert "and 20 more" in many.difference(Vocabulary([]))
    assert "only in the second: nothing" in many.difference(Vocabulary([]))


def test_clean_name() -> None:
    assert clean_name("aerosol_can") == "aerosol can"
    assert clean_name("bow_(decorative_ribbons)") == "bow (decorative ribbons)"
    assert clean_name(" flip-flop_(sandal)") == "flip-flop (sandal)"
