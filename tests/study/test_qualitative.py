"""Two checkpoints on rare objects: what counts as found, what is shown, what is refused."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_world import in_line, tiny_recipe

from pipeline.data.miniature.world import draw_world
from pipeline.data.shards.index import Index, load_index
from pipeline.data.shards.preparing import prepare_source, shards_url
from pipeline.data.vocabulary.categories import Category, Vocabulary
from pipeline.detectors import build_detector
from pipeline.errors import RecipeError, StorageError
from pipeline.evaluation.detections import Detections
from pipeline.recipe import Recipe
from pipeline.study.output import Outcome
from pipeline.study.qualitative import qualitative
from pipeline.study.qualitative_page import Compared, render
from pipeline.study.rare_objects import RareObjects, find
from pipeline.training.checkpoint import Progress, State, save

VALIDATION = {
    "name": "lvis_val",
    "format": "lvis",
    "images": "lvis",
    "annotations": "annotations/lvis_v1_val.json",
}


def detections(*rows: tuple[int, int, tuple[float, ...], float]) -> Detections:
    image, category, bbox, score = zip(*rows, strict=True) if rows else ((), (), (), ())
    return Detections(
        np.array(image, np.int64),
        np.array(category, np.int64),
        np.array(bbox, np.float64).reshape(-1, 4),
        np.array(score, np.float64),
    )


def test_found_is_right_category_image_and_place() -> None:
    image, category = np.array([1, 1, 2, 3]), np.array([7, 7, 7, 8])
    bbox = np.array([[0, 0, 10, 10], [6, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 10]], float)
    found = find(
        image,
        category,
        bbox,
        detections(
            (3, 7, (0, 0, 10, 10), 0.9),  # another category
            (2, 7, (0, 0, 10, 4.9), 0.9),  # IoU 0.49
            (1, 7, (1, 0, 10, 10), 0.5),  # takes the first,
            (1, 7, (0, 0, 10, 10), 0.8),  # but this one is surer
            (1, 7, (2, 0, 9, 10), 0.2),  # too far from the second
        ),
    )
    assert found.tolist() == [3, -1, -1, -1]
    exact = detections((2, 7, (0, 0, 10, 5), 0.1))
    assert find(image, category, bbox, exact).tolist() == [-1, -1, 0, -1], "IoU of 0.5 is enough"
    assert find(image, category, bbox, detections()).tolist() == [-1] * 4


def test_two_objects_need_two_detections() -> None:
    image, category = np.array([1, 1]), np.array([7, 7])
    bbox = np.array([[0, 0, 10, 10], [1, 0, 10, 10]], float)
    once = detections((1, 7, (1, 0, 10, 10), 0.5))
    assert find(image, category, bbox, once).tolist() == [-1, 0]
    twice = detections((1, 7, (1, 0, 10, 10), 0.5), (1, 7, (1, 0, 10, 10), 0.4))
    assert find(image, category, bbox, twice).tolist() == [1, 0]


def test_images_are_drawn_from_all_where_exactly_one_finds() -> None:
    finder = np.array([[0, 0], [0, -1], [-1, 0], [-1, -1], [3, -1], [-1, 4]])
    objects = RareObjects(np.array([1, 2, 3, 4, 2, 6]), np.full(6, 7), np.zeros((6, 4)), finder)
    assert objects.outcomes() == {"both": 1, "only_a": 2, "only_b": 2, "neither": 1}
    assert sorted(objects.choose_images(9, 0)) == [2, 3, 6]
    assert objects.choose_images(2, 5) == objects.choose_images(2, 5)
    firsts = {objects.choose_images(1, seed)[0] for seed in range(30)}
    assert firsts == {2, 3, 6}, "every one can be drawn"


@pytest.fixture(scope="module")
def recipe(module_path: Path) -> Recipe:
    torch.set_num_threads(1)
    sizes = {"evaluation_short_side": 64, "evaluation_max_side": 96}
    stage = tiny_recipe(
        module_path,
        "pair",
        semantic=None,
        data={"validation": VALIDATION, "transforms": sizes},
        evaluation={"batch_size": 4},
    )
    draw_world(stage.data.root, "tiny", 0)
    assert stage.data.validation is not None
    prepare_source(stage.data.validation, stage.data, in_line)
    return stage


@pytest.fixture(scope="module")
def index(recipe: Recipe) -> Index:
    assert recipe.data.validation is not None
    return load_index(shards_url(recipe.data, recipe.data.validation))


def checkpoint(recipe: Recipe, vocabulary: Vocabulary, step: int) -> str:
    torch.manual_seed(step)
    embeddings = torch.nn.functional.normalize(torch.randn(vocabulary.num_categories, 16), dim=-1)
    detector = build_detector(
        recipe.detector, num_categories=vocabulary.num_categories, text_embeddings=embeddings
    )
    weights = {f"detector.{name}": tensor for name, tensor in detector.state_dict().items()}
    state = State(weights, {}, {"exp_avg/x": torch.zeros(1)}, step)
    return str(save(state, Progress(step, 0, {}), recipe, vocabulary, 1))


def compare(recipe: Recipe, *checkpoints: str, threshold: float = 0.0, images: int = 3) -> Outcome:
    return qualitative(
        recipe,
        checkpoints,
        images=images,
        score_threshold=threshold,
        seed=0,
        device=torch.device("cpu"),
    )


def test_two_checkpoints_are_compared_on_all_rare_objects(
    recipe: Recipe, index: Index, tmp_path: Path
) -> None:
    path = Path(recipe.data.root) / "annotations/lvis_v1_val.json"
    tree = json.loads(path.read_text(encoding="utf-8"))
    rare = {c["id"] for c in tree["categories"] if c["frequency"] == "r"}
    boxes = [row for row in tree["annotations"] if row["category_id"] in rare]
    places = [checkpoint(recipe, index.vocabulary, step) for step in (4, 7)]
    outcome = compare(recipe, *places)
    figures = outcome.figures
    assert figures["rare_objects"] == len(boxes) == sum(figures["outcomes"].values())
    assert figures["images_with_rare_objects"] == len({row["image_id"] for row in boxes})
    assert sum(row["objects"] for row in outcome.rows) == len(boxes)
    assert all(f"pair, step {step} (" in outcome.page for step in (4, 7))
    bar = re.findall(r'<rect class="bar [^"]*"[^>]*><title>[^<]*: ([\d.]+)%<', outcome.page)
    shares = [100 * number / len(boxes) for number in figures["outcomes"].values() if number]
    assert sorted(map(float, bar)) == pytest.approx(sorted(shares), abs=0.06)
    # One checkpoint against itself never differs, and nothing is shown.
    same = compare(recipe, places[0], places[0])
    assert same.figures["outcomes"]["only_a"] == same.figures["outcomes"]["only_b"] == 0
    assert same.figures["shown"] == [] and "there is none to show" in same.page
    assert "data:image/jpeg" not in same.page


def known(index: Index, recipe: Recipe) -> Compared:
    """The first rare object is found by A alone, with a score of 0.8."""
    rare = [c.id for c in index.vocabulary.categories if c.frequency == "r"]
    place = next(k for k in range(len(index)) if set(index.read(k).category_ids) & set(rare))
    sample = index.read(place)
    row = int(np.flatnonzero(np.isin(sample.category_ids, rare))[0])
    x0, y0, x1, y1 = sample.boxes[row].tolist()
    number, bbox = int(sample.category_ids[row]), (x0, y0, x1 - x0, y1 - y0)
    found = detections((sample.image_id, number, bbox, 0.8)), detections()
    ids = np.array([sample.image_id]), np.array([number]), np.array([bbox])
    finder = np.stack([find(*ids, one) for one in found], axis=1)
    titles, places = ("A: one", "B: two"), ("one", "two")
    return Compared(recipe, index, titles, places, found, RareObjects(*ids, finder), 0.3, 0)


def test_pictures_show_what_only_one_finds(recipe: Recipe, index: Index) -> None:
    compared = known(index, recipe)
    chosen = compared.objects.choose_images(5, 0)
    figures = {
        "rare_objects": 1,
        "outcomes": compared.objects.outcomes(),
        "images_with_rare_objects": 1,
        "images_where_they_differ": 1,
        "score_threshold": 0.3,
    }
    page = render(compared, chosen, [], figures)
    pictures = re.findall(r"<figure style=.*?</figure>", page, re.DOTALL)
    assert len(pictures) == 2 == page.count("data:image/jpeg")
    first, second = pictures
    name = index.vocabulary.names[index.vocabulary.column_of(int(compared.objects.category_id[0]))]
    plain = name.replace("_", " ")
    assert f"{plain}, score 0.800" in first and f"{plain} 0.80<" in first
    assert "found rare" in first and "truth rare" not in first
    assert "truth rare" in second and "found rare" not in second
    assert "found here, not by the other" in first and "fill:#ffd60a" in first
    assert "found by the other, not here" in second and "fill:#ffd60a" not in second
    assert f'finds <span class="rare">{plain}' in first
    assert f'misses <span class="rare">{plain}' in second
    assert "These are all 1 images" in page


def test_other_vocabularies_are_refused(recipe: Recipe, index: Index, tmp_path: Path) -> None:
    own = checkpoint(recipe, index.vocabulary, 4)
    other = Vocabulary([Category(1, "cup", frequency="r"), Category(2, "owl", frequency="f")])
    stage = recipe.model_copy(update={"output": str(tmp_path)})
    with pytest.raises(RecipeError, match="another vocabulary than the validation source lvis_val"):
        compare(recipe, own, checkpoint(stage, other, 4))


def test_bad_options_are_refused(recipe: Recipe, index: Index, tmp_path: Path) -> None:
    own = checkpoint(recipe, index.vocabulary, 4)
    with pytest.raises(RecipeError, match="does not exist"):
        compare(recipe, own, "nowhere")
    with pytest.raises(RecipeError, match="--images is 0"):
        compare(recipe, own, own, images=0)
    with pytest.raises(RecipeError, match=r"--score-threshold is 1\.5"):
        compare(recipe, own, own, threshold=1.5)
    bare = recipe.model_copy(update={"data": recipe.data.model_copy(update={"validation": None})})
    with pytest.raises(RecipeError, match=r"has no data\.validation"):
        compare(bare, own, own)
    moved = recipe.data.model_copy(update={"shards": str(tmp_path)})
    with pytest.raises(StorageError, match="longtail prepare"):
        compare(recipe.model_copy(update={"data": moved}), own, own)
