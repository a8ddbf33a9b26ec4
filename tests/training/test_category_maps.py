"""The category maps in use stand beside a run, and read back as what was trained with."""

from pathlib import Path

from pipeline.data.vocabulary.categories import Category, Vocabulary
from pipeline.data.vocabulary.category_map import match_categories, read_map
from pipeline.training.log import write_category_maps

OURS = Vocabulary([Category(1, "cat"), Category(2, "dog")])
THEIRS = Vocabulary([Category(5, "Dog"), Category(6, "Cats")])


def test_maps_of_other_vocabularies_are_written(tmp_path: Path) -> None:
    found = match_categories(THEIRS, OURS)
    write_category_maps(tmp_path, {"own": match_categories(OURS, OURS), "other": found})
    assert [path.name for path in (tmp_path / "category_maps").iterdir()] == ["other.csv"]
    data = (tmp_path / "category_maps/other.csv").read_bytes()
    assert read_map("other.csv", data, THEIRS, OURS).columns.tolist() == [1, -1]


def test_a_run_of_one_vocabulary_has_none(tmp_path: Path) -> None:
    write_category_maps(tmp_path, {"own": match_categories(OURS, OURS)})
    assert list(tmp_path.iterdir()) == []
