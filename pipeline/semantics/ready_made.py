"""Text embeddings that somebody else has made, from a file."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file
from torch import Tensor, nn

from pipeline.errors import RecipeError
from pipeline.recipe import Teacher
from pipeline.semantics.clip import model_config, short

_KEY = "text_embeddings"


def read_text_embeddings(section: Teacher, names: Sequence[str]) -> Tensor:
    """(C, D) float32 unit rows of `section.text_embeddings`, one for each name, in their order.

    The file holds (C, D) or (D, C), of any length of the vectors. Raises `RecipeError` for a file
    that cannot be read, for another number of categories or another width than the model's, and
    for a vector without a direction.
    """
    assert section.text_embeddings is not None
    path = Path(section.text_embeddings).expanduser()
    values = _read(path)
    width = model_config(section.model)["embed_dim"]
    if values.shape == (width, len(names)) and values.shape != (len(names), width):
        values = values.T
    if values.shape != (len(names), width):
        raise RecipeError(_misfit(path, values.shape, len(names), section.model, width))
    rows = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    lengths = rows.norm(dim=1)
    wrong = ((lengths == 0) | ~lengths.isfinite()).nonzero().flatten().tolist()
    if wrong:
        raise RecipeError(
            f"teacher.text_embeddings {path}: row {wrong[0]}, of category {names[wrong[0]]!r}, is "
            f"zero or not finite ({len(wrong)} rows are); make them again"
        )
    return nn.functional.normalize(rows, dim=1)


def _read(path: Path) -> NDArray[np.floating]:
    if not path.is_file():
        raise RecipeError(f"teacher.text_embeddings {path} is no file")
    try:
        if path.suffix == ".npy":
            # Arrays of objects are pickles, which run code when they are read.
            values = np.load(path, allow_pickle=False)
        elif path.suffix == ".safetensors":
            values = load_file(path)[_KEY]
        else:
            raise RecipeError(
                f"teacher.text_embeddings {path} must be .npy, or .safetensors with the key {_KEY}"
            )
    except (ValueError, OSError, EOFError, KeyError, SafetensorError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(
            f"teacher.text_embeddings {path} cannot be read without running code ({short(error)}); "
            f"give an .npy array of numbers, or .safetensors with the key {_KEY}"
        ) from None
    if values.ndim != 2 or not np.issubdtype(values.dtype, np.floating):
        raise RecipeError(
            f"teacher.text_embeddings {path} is {values.shape} of {values.dtype}, and has to be "
            "a vector of floating-point numbers for each category"
        )
    return values


def _misfit(path: Path, shape: tuple[int, ...], count: int, model: str, width: int) -> str:
    text = f"teacher.text_embeddings {path} is {shape[0]} x {shape[1]}, and "
    if width not in shape:
        return text + (
            f"the embeddings of teacher.model {model!r} are {width} wide; give some that the text "
            "tower of that model made, or name the model that made these"
        )
    return text + (
        f"the vocabulary has {count} categories; give a row for each, in the order of their ids"
    )
