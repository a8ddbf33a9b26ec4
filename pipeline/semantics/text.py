"""Category names to text embeddings: prompts, the text tower, and a cache by content."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import open_clip
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.data.vocabulary import clean_name
from pipeline.errors import RecipeError, StorageError
from pipeline.recipe import Teacher
from pipeline.semantics.clip import (
    content_hash,
    encode_text,
    load_clip,
    model_config,
    weights_identity,
)

_PROMPTS = Path(__file__).parent / "prompts"
_BATCH = 256


def templates(prompts: str) -> list[str]:
    """The prompt templates of a set, each with one `{}` for the name."""
    lines = (_PROMPTS / f"{prompts}.txt").read_text(encoding="utf-8").splitlines()
    found = [line for line in lines if line]
    assert all(line.count("{}") == 1 for line in found)
    return found


def text_embeddings(
    section: Teacher, names: Sequence[str], weights: Path | None, cache_dir: str | Path
) -> Tensor:
    """(C, D) float32 unit rows on the CPU, one for each category name.

    Each template's embedding is normalised, the mean over templates again (CLIP's zero-shot
    recipe). The result is kept under `cache_dir` by the content that it follows from, and the text
    tower is gone when this returns.
    """
    if not names:
        raise RecipeError("the vocabulary has no categories, so there is nothing to embed")
    patterns = templates(section.prompts)
    cleaned = [clean_name(name) for name in names]
    identity = weights_identity(section, weights)
    key = content_hash(model_config(section.model), identity, patterns, cleaned)
    path = Path(cache_dir) / f"text_{key}.safetensors"
    if path.is_file():
        try:
            return load_file(path)["text_embeddings"]
        except (SafetensorError, KeyError) as error:
            raise StorageError(f"{path} is damaged ({error}); delete it and run again") from None
    embeddings = _embed(section, weights, cleaned, patterns)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    os.close(handle)
    save_file({"text_embeddings": embeddings}, temporary)
    os.replace(temporary, path)
    return embeddings


@torch.no_grad()
def _embed(
    section: Teacher, weights: Path | None, names: Sequence[str], patterns: Sequence[str]
) -> Tensor:
    model = load_clip(section, weights)
    tokenizer = open_clip.get_tokenizer(section.model)
    texts = [pattern.format(name) for name in names for pattern in patterns]
    rows = []
    for first in range(0, len(texts), _BATCH):
        rows.append(encode_text(model, tokenizer(texts[first : first + _BATCH])))
    per_template = torch.cat(rows).view(len(names), len(patterns), -1)  # (C, P, D)
    return nn.functional.normalize(per_template.mean(dim=1), dim=-1)
