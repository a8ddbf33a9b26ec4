"""Recipes: the paper's defaults, and an error that teaches for everything that can be wrong."""

from pathlib import Path

import pytest

from pipeline.errors import RecipeError
from pipeline.recipe import Recipe, Source
from pipeline.recipe_file import load_recipe, parse_yaml

ROOT = Path(__file__).resolve().parents[1]

MINIMAL = """
name: example
data:
  root: /data
  train:
    - {name: lvis_train, format: lvis, images: lvis, annotations: train.json}
training:
  steps: 100
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL)
    return path


def test_defaults_are_the_papers(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    assert recipe.semantic is not None and recipe.semantic.weight == 0.5
    assert recipe.teacher.model == "RN50"
    assert recipe.detector.num_queries == 900
    assert recipe.detector.losses.federated_categories == 50
    assert recipe.detector.losses.federated_power == 0.5
    assert recipe.data.repeat_threshold == 0.001
    assert recipe.training.batch_size == 16
    assert recipe.training.clip_norm == 0.1
    assert recipe.data.transforms.short_sides[0] == 480
    assert recipe.data.transforms.short_sides[-1] == 800


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.stepz=3", "did you mean 'steps'"),
        ("detector.backbon=3", "did you mean 'backbone'"),
        ("data.train.0.formt=lvis", "did you mean 'format'"),
        ("teacher.promts=single", "did you mean 'prompts'"),
        ("training.steps=abc", "training.steps: input should be a valid integer"),
        ("training.batch_size=0", "greater than or equal to 1"),
        ("training.batch_size=true", "batch_size is not a yes-or-no value"),
        ("training.warmup_steps=100", "warmup_steps 100 is not before the last step"),
        ("training.ema_decay=1.0", "less than 1"),
        ("seed=99999999999999999999", "less than"),
        ("training.drop_steps=[200]", "not before the last step"),
        ("training.learning_rate=-1", "greater than 0"),
        ("cluster.workers=3", "does not divide among cluster.workers 3"),
        ("cluster.workers=[2, 1]", "or two of them, [least, most]"),
        ("cluster.workers=[2]", "or two of them, [least, most]"),
        ("cluster.workers=[1, 17]", "leaves some of cluster.workers [1, 17] without an image"),
        ("detector.hidden_dim=100", "multiple of twice num_heads"),
        ("detector.num_feature_levels=2", "fewer than the 3 maps"),
        ("data.train.0.format=coca", "'lvis', 'objects365', 'imagenet21k', 'cc3m'"),
        ("data.train.3.weight=1", "position from 0 to 0"),
        ("data.vocabulary=lvis_trian", "did you mean 'lvis_train'"),
        ("teacher.pretrained=null", "needs weights"),
        ("initialize_from=example", "is this recipe itself"),
        ("detector.backbone.weights=null", "norm frozen needs trained weights"),
        ("name.x=1", "is not a section"),
        ("training.steps", "not of the form section.key=value"),
        ("training.steps=[1", "not valid YAML"),
    ],
)
def test_a_wrong_value_names_place_rule_and_fix(
    recipe_file: Path, override: str, message: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe_file, [override])
    assert message in str(caught.value)
    assert caught.value.exit_code == 78


def test_overrides_reach_sections_lists_and_null(recipe_file: Path) -> None:
    recipe = load_recipe(
        recipe_file, ["training.learning_rate=2e-4", "data.train.0.weight=3", "semantic=null"]
    )
    assert recipe.training.learning_rate == 2e-4
    assert recipe.data.train[0].weight == 3.0
    assert recipe.semantic is None


def test_show_prints_a_recipe_that_loads_to_the_same(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file)
    again = tmp_path / "again.yaml"
    again.write_text(recipe.to_yaml())
    assert load_recipe(again) == recipe
    assert load_recipe(again).hash() == recipe.hash()


def test_the_hash_follows_every_value(recipe_file: Path) -> None:
    hashes = {
        load_recipe(recipe_file, overrides).hash()
        for overrides in ([], ["seed=1"], ["training.steps=101"], ["detector.dropout=0.1"])
    }
    assert len(hashes) == 4


def test_a_recipe_is_frozen(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    with pytest.raises(ValueError, match="frozen"):
        recipe.training.steps = 5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.5E+3", 1500.0),
        ("010", 10),
        ("12:30:45", "12:30:45"),
        ("on", "on"),
        ("no", "no"),
        ("true", True),
        ("~", None),
        ("", None),
        ("2026-01-02", "2026-01-02"),
        ("0x10", "0x10"),
    ],
)
def test_scalars_are_yaml_1_2(text: str, value: object) -> None:
    tree = parse_yaml(f"key: {text}", "test")
    assert tree == {"key": value}
    assert type(tree["key"]) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: key 'a' is given twice"),
        ("a: &x 1\nb: *x", "aliases are not allowed"),
        ("a: [1", "not valid YAML"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_yaml_that_hides_something_is_refused(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match="test") as caught:
        parse_yaml(text, "test")
    assert message in str(caught.value)


def test_missing_file_and_wrong_top_level(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="does not exist"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes("description: caf\u00e9".encode("latin-1"))
    with pytest.raises(RecipeError, match="not UTF-8"):
        load_recipe(tmp_path / "latin.yaml")
    (tmp_path / "list.yaml").write_text("[1, 2]")
    with pytest.raises(RecipeError, match="a recipe is a mapping"):
        load_recipe(tmp_path / "list.yaml")


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_recipe_loads(path: Path) -> None:
    recipe = load_recipe(path)
    assert isinstance(recipe, Recipe)
    assert recipe.name == path.stem


TEACHES = {"images": "imagenet21k", "name": "inet", "format": "imagenet21k"}
DETIC = {"losses": {"image_level": "max_size"}}


@pytest.mark.parametrize(
    ("extra", "sections", "message"),
    [
        (
            {"use_labels": False},
            {"detector": DETIC},
            "source inet: detector.losses.image_level max_size .Detic. learns the labels",
        ),
        ({"annotations": "t.tsv", "use_class": False}, {"detector": DETIC}, "this source gives no"),
        (
            {"format": "cc3m", "annotations": "c.tsv"},
            {"detector": DETIC},
            "source inet: .*captions need files.classes",
        ),
        (
            {"use_labels": False, "use_box": False},
            {"semantic": None},
            "source inet: nothing is learned from it",
        ),
        (
            {"use_labels": False, "use_box": False},
            {"semantic": {"labels": "hard"}},
            "with semantic.labels hard it needs labels",
        ),
        (
            {"annotations": "t.tsv"},
            {
                "semantic": {"columns": "federated"},
                "detector": {"losses": {"federated_categories": 0}},
            },
            "federated_categories is 0; set it to 50",
        ),
        (
            {"annotations": "t.tsv"},
            {"semantic": {"objective": "features"}, "teacher": {"top_k": 5}},
            "semantic.objective features learns embeddings",
        ),
    ],
)
def test_what_would_teach_nothing_is_refused(
    recipe_file: Path, extra: dict[str, object], sections: dict[str, object], message: str
) -> None:
    tree = load_recipe(recipe_file).model_dump()
    tree["data"]["extra"] = [TEACHES | extra]
    for name, section in sections.items():
        tree[name] = section if section is None else (tree[name] or {}) | section
    with pytest.raises(ValueError, match=message):
        Recipe.model_validate(tree)


@pytest.mark.parametrize("key", ["use_labels", "use_class"])
def test_labels_that_captions_cannot_have_are_refused(
    recipe_file: Path, tmp_path: Path, key: str
) -> None:
    tree, again = load_recipe(recipe_file).model_dump(), tmp_path / "again.yaml"
    captions = TEACHES | {"name": "cc", "format": "cc3m", "annotations": "c.tsv"}
    for files in ({}, {"files": {}}):
        tree["data"]["extra"] = [captions | files | {key: True}]
        with pytest.raises(ValueError, match=f"source cc: format cc3m: {key} is true, and captio"):
            Recipe.model_validate(tree)
    for given in ({}, {key: False}, {key: True, "files": {"classes": "lvis.json"}}):
        tree["data"]["extra"] = [captions | given]
        recipe = Recipe.model_validate(tree)
        # As a run directory keeps it, with every key, and as workers are told.
        again.write_text(recipe.to_yaml())
        assert load_recipe(again) == Recipe.model_validate_json(recipe.model_dump_json()) == recipe
        assert load_recipe(again).hash() == recipe.hash()


def test_unlabelled_sources_may_teach_boxes_or_semantics(recipe_file: Path) -> None:
    tree = load_recipe(recipe_file).model_dump()
    unlabelled = {"use_labels": False}
    for extra in ({}, {"use_semantic": False}, {"use_box": False}):
        tree["data"]["extra"] = [TEACHES | unlabelled | extra]
        assert Recipe.model_validate(tree).data.extra[0].use_labels is False


@pytest.mark.parametrize(
    ("format_", "given", "sampled"),
    [
        ("lvis", None, True),
        ("objects365", None, True),
        ("imagenet21k", None, False),
        ("cc3m", None, False),
        ("lvis", "verified", False),
        ("imagenet21k", "sampled", True),
    ],
)
def test_negatives_of_image_level_sources_are_verified_ones(
    format_: str, given: str | None, sampled: bool
) -> None:
    source = Source.model_validate(
        {
            "name": "x",
            "format": format_,
            "images": "x",
            "annotations": "x",
            "federated_negatives": given,
        }
    )
    assert source.samples_negatives == sampled


def test_hard_labels_and_detic_ask_no_teacher_in_training(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    assert recipe.uses_soft_labels
    hard = load_recipe(recipe_file, ["semantic.labels=hard"])
    assert not hard.uses_soft_labels
    detic = load_recipe(recipe_file, ["semantic=null", "detector.losses.image_level=max_size"])
    assert not detic.uses_soft_labels
