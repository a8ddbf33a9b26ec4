"""A checkpoint of a small detector with random weights, saved as training saves it."""

from pathlib import Path

import torch
from tiny_world import tiny_recipe

from pipeline.data.vocabulary.categories import Category, Vocabulary
from pipeline.detectors import build_detector
from pipeline.recipe import Recipe
from pipeline.training.checkpoint import Progress, State, save

VOCABULARY = Vocabulary(
    [
        Category(3, "striped_teal_ring", frequency="r"),
        Category(5, "aerosol_can", frequency="f"),
        Category(9, "bow_(weapon)", frequency="c"),
        Category(12, "kite", frequency="f"),
    ]
)


def checkpoint_recipe(folder: Path, **changes: object) -> Recipe:
    """A recipe that looks at images with short side 64."""
    sizes = {"evaluation_short_side": 64, "evaluation_max_side": 128}
    data = {
        "root": str(folder / "raw"),
        "transforms": sizes,
        "validation": {
            "name": "lvis_val",
            "format": "lvis",
            "images": "photographs",
            "annotations": "lvis.json",
        },
        "extra": [],
        "workers": 0,
    }
    return tiny_recipe(folder, "toy", semantic=None, data=data, **changes)


def save_checkpoint(folder: Path, step: int = 7, *, averaged: bool = True) -> Path:
    """A `step_N` folder in `folder/runs/toy`; averages differ from the weights themselves."""
    recipe = checkpoint_recipe(folder)
    torch.manual_seed(step)
    embeddings = torch.nn.functional.normalize(torch.randn(VOCABULARY.num_categories, 16), dim=-1)
    detector = build_detector(
        recipe.detector, num_categories=VOCABULARY.num_categories, text_embeddings=embeddings
    )
    with torch.no_grad():
        for parameter in detector.bbox_embed.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    weights = {f"detector.{name}": tensor for name, tensor in detector.state_dict().items()}
    weights["branch.project.weight"] = torch.ones(2, 2)
    averages = {
        f"detector.{name}": parameter.detach() * 1.01
        for name, parameter in detector.named_parameters()
    }
    state = State(weights, averages if averaged else {}, {"exp_avg/x": torch.zeros(1)}, step)
    return save(state, Progress(step, 0, {}), recipe, VOCABULARY, 1)
