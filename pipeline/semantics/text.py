"""Category names to text embeddings: prompts, the text tower, and a cache by content."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

import open_clip
import torch
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from pipeline.data.storage.files import publish_bytes
from pipeline.data.vocabulary.categories import clean_name
from pipeline.errors import RecipeError, StorageError
from pipeline.recipe import Teacher
from pipeline.semantics.clip import (
    content_hash,
    encode_text,
    how_to_get,
    load_clip,
    model_config,
    short,
    weights_identity,
)
from pipeline.semantics.ready_made import read_text_embeddings

Tokenizer: TypeAlias = SimpleTokenizer | HFTokenizer
Progress: TypeAlias = Callable[[int, int], object]
"""Told how many prompts are done, of how many."""

_PROMPTS = Path(__file__).parent / "prompts"
_BATCH = 256


def templates(prompts: str) -> list[str]:
    """The prompt templates of a set, each with one `{}` for the name."""
    lines = (_PROMPTS / f"{prompts}.txt").read_text(encoding="utf-8").splitlines()
    found = [line for line in lines if line]
    assert all(line.count("{}") == 1 for line in found)
    return found


def text_embeddings(
    section: Teacher,
    names: Sequence[str],
    weights: Path | None,
    cache_dir: str | Path,
    *,
    device: torch.device | str = "cpu",
    progress: Progress = lambda done, total: None,
) -> Tensor:
    """(C, D) float32 unit rows on the CPU, one for each category name, made on `device`.

    Each template's embedding is normalised, the mean over templates again (CLIP's zero-shot
    recipe). The result is kept under `cache_dir` by the content that it follows from, and the text
    tower is gone when this returns. Ready-made ones are read instead where the recipe names them.
    """
    if not names:
        raise RecipeError("the vocabulary has no categories, so there is nothing to embed")
    if section.text_embeddings is not None:
        return read_text_embeddings(section, names)
    check_names(section, names)
    path = cached_text(section, names, weights, cache_dir)
    if path.is_file():
        try:
            return load_file(path)["text_embeddings"]
        except (SafetensorError, KeyError) as error:
            raise StorageError(f"{path} is damaged ({error}); delete it and run again") from None
    embeddings = _embed(section, weights, names, device, progress)
    publish_bytes(str(path), save({"text_embeddings": embeddings}))
    return embeddings


def cached_text(
    section: Teacher, names: Sequence[str], weights: Path | None, cache_dir: str | Path
) -> Path:
    """Where the text embeddings of these names are kept once they are made."""
    identity = weights_identity(section, weights)
    cleaned = [clean_name(name) for name in names]
    key = content_hash(model_config(section.model), identity, templates(section.prompts), cleaned)
    return Path(cache_dir) / f"text_{key}.safetensors"


def check_text(section: Teacher, names: Sequence[str]) -> None:
    """Raise what `text_embeddings` would raise for these names, without any weights."""
    if section.text_embeddings is not None:
        read_text_embeddings(section, names)
    else:
        check_names(section, names)


def check_names(section: Teacher, names: Sequence[str]) -> None:
    """Refuse, with a `RecipeError`, names that the text tower cannot read whole.

    Its tokenizer would cut what is too long, and say nothing of a name that it makes nothing of.
    """
    tokenizer = text_tokenizer(section.model)
    context = model_config(section.model)["text_cfg"].get("context_length", 77)
    patterns = templates(section.prompts)
    bare = _lengths(tokenizer, [pattern.format("") for pattern in patterns])
    longest = patterns[bare.index(max(bare))]
    cleaned = [clean_name(name) for name in names]
    alone = _lengths(tokenizer, ["", *cleaned])
    prompts = _lengths(tokenizer, [longest.format(name) for name in cleaned])
    for name, length, whole in zip(names, alone[1:], prompts, strict=True):
        if length <= alone[0]:
            raise RecipeError(
                f"category name {name!r} gives no token of teacher.model {section.model!r}, so "
                "there is nothing to embed; give it a name in words"
            )
        if whole > context:
            raise RecipeError(
                f"category name {name!r} is {whole} tokens in the prompt {longest!r}, and "
                f"teacher.model {section.model!r} reads {context}; shorten it, or give ready-made "
                "embeddings as teacher.text_embeddings"
            )


def text_tokenizer(model: str) -> Tokenizer:
    """The tokenizer of an open_clip model; raises `StorageError` where its files are not here."""
    foreign = model_config(model)["text_cfg"].get("hf_tokenizer_name")
    try:
        return open_clip.get_tokenizer(model)
    except (OSError, ImportError, RuntimeError, ValueError) as error:
        raise StorageError(
            f"teacher.model {model!r} has a tokenizer of its own, {foreign}, which cannot be "
            f"loaded ({short(error)}); {how_to_get(str(foreign))}; or give ready-made embeddings "
            "as teacher.text_embeddings, which need no tokenizer"
        ) from error


def _lengths(tokenizer: Tokenizer, texts: Sequence[str]) -> list[int]:
    """How many tokens each text takes with the marks around it, however many there is room for."""
    if isinstance(tokenizer, SimpleTokenizer):
        return [len(tokenizer.encode(text)) + 2 for text in texts]
    found = tokenizer.tokenizer([tokenizer.clean_fn(text) for text in texts]).input_ids
    return [len(tokens) for tokens in found]


@torch.no_grad()
def _embed(
    section: Teacher,
    weights: Path | None,
    names: Sequence[str],
    device: torch.device | str,
    progress: Progress,
) -> Tensor:
    model = load_clip(section, weights).to(device)
    tokenizer = text_tokenizer(section.model)
    patterns = templates(section.prompts)
    texts = [pattern.format(clean_name(name)) for name in names for pattern in patterns]
    rows = []
    for first in range(0, len(texts), _BATCH):
        tokens = tokenizer(texts[first : first + _BATCH]).to(device)
        rows.append(encode_text(model, tokens).cpu())
        progress(min(first + _BATCH, len(texts)), len(texts))
    per_template = torch.cat(rows).view(len(names), len(patterns), -1)  # (C, P, D)
    return nn.functional.normalize(per_template.mean(dim=1), dim=-1)
