"""open_clip models by name: what is known of them before weights, and loading, never at random."""

import difflib
import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import open_clip
import safetensors
import torch
from torch import Tensor, nn

from pipeline.errors import RecipeError, StorageError
from pipeline.recipe import Teacher

_CONFIGS = Path(__file__).parent / "model_configs"


def model_config(name: str) -> dict[str, object]:
    """The open_clip config of a model whose image tower is a ModifiedResNet.

    Raises `RecipeError` for an unknown name and for any other kind of tower: region features are
    pooled by the attention pool that only these towers have.
    """
    if not set(_own_models()) <= set(open_clip.list_models()):
        open_clip.add_model_config(_CONFIGS)
    config = open_clip.get_model_config(name) if name in open_clip.list_models() else None
    if config is None:
        close = difflib.get_close_matches(name, open_clip.list_models(), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise RecipeError(f"teacher.model {name!r} is no open_clip model{hint}")
    if not isinstance(config["vision_cfg"].get("layers"), list) or config.get("custom_text"):
        raise RecipeError(
            f"teacher.model {name!r} has no attention pool to read regions with; use a ResNet "
            "tower: RN50, RN101, RN50x4, RN50x16, RN50x64 or miniature-rn"
        )
    return dict(config)


def new_clip(name: str, *, quick_gelu: bool = False) -> open_clip.CLIP:
    """The model with random weights: only to be trained, or to have weights loaded into it."""
    config = model_config(name)
    config["quick_gelu"] = bool(config.get("quick_gelu")) or quick_gelu
    return open_clip.CLIP(**config)


def load_clip(section: Teacher, weights: Path | None) -> open_clip.CLIP:
    """The teacher's model in evaluation mode, without gradients, float32.

    `weights` is the file of a teacher trained here; without it `section.pretrained` is loaded.
    Raises `RecipeError` where that is neither a tag nor a file, or does not fit the model.
    """
    tag = _tag_config(section) if weights is None else {}
    path = weights if weights is not None else _weights_path(section, tag)
    # OpenAI's weights were trained with the quick GELU, which the plain model names do not use.
    model = new_clip(section.model, quick_gelu=bool(tag.get("quick_gelu")))
    try:
        open_clip.load_checkpoint(model, str(path), strict=True, weights_only=True)
    except (
        AssertionError,  # open_clip, where the text tower is of another width
        RuntimeError,
        KeyError,
        pickle.UnpicklingError,
        safetensors.SafetensorError,
        StopIteration,
    ) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise RecipeError(
            f"{path} does not hold weights of teacher.model {section.model!r} that load without "
            f"running code ({reason}); give a state dict as .safetensors or .pt"
        ) from error
    return model.eval().requires_grad_(False)


def pixel_statistics(section: Teacher) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the pixels, as fractions, that the weights were trained on."""
    tag = _tag_config(section)
    mean = tag.get("mean") or open_clip.OPENAI_DATASET_MEAN
    std = tag.get("std") or open_clip.OPENAI_DATASET_STD
    return tuple(mean), tuple(std)


def weights_identity(section: Teacher, weights: Path | None) -> str:
    """What the weights are, for content hashes: the digest of a file, or a published tag."""
    path = weights
    if path is None and not _tag_config(section):
        path = _weights_path(section, {})
    if path is None:
        return f"tag {section.pretrained}"
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_hash(*parts: object) -> str:
    """Sixteen hex digits over plain data."""
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def encode_text(model: open_clip.CLIP, tokens: Tensor) -> Tensor:
    """Unit rows (N, D) for (N, L) tokens, computed over the longest text of them only.

    Attention is causal and the end token is the largest, so cutting off padding changes nothing.
    """
    assert model.attn_mask is not None and model.text_pool_type == "argmax"
    length = int(tokens.argmax(dim=-1).max()) + 1
    states = model.token_embedding(tokens[:, :length]) + model.positional_embedding[:length]
    states = model.transformer(states, attn_mask=model.attn_mask[:length, :length])
    states = model.ln_final(states)
    ends = tokens.argmax(dim=-1)
    pooled = states[torch.arange(len(tokens), device=tokens.device), ends]
    return nn.functional.normalize(pooled @ model.text_projection, dim=-1)


def _own_models() -> list[str]:
    return [path.stem for path in sorted(_CONFIGS.glob("*.json"))]


def _tag_config(section: Teacher) -> dict[str, Any]:
    """open_clip's facts on a published tag; empty for a local file or a teacher of our own."""
    if section.pretrained is None:
        return {}
    return dict(open_clip.get_pretrained_cfg(section.model, section.pretrained))


def _weights_path(section: Teacher, tag: dict[str, Any]) -> Path:
    assert section.pretrained is not None, "a teacher without `pretrained` is trained first"
    if tag:
        try:
            return Path(open_clip.download_pretrained(tag))
        except (OSError, RuntimeError, ImportError) as error:
            raise StorageError(
                f"cannot download {section.model} weights {section.pretrained!r} ({error}); "
                "download them elsewhere and set teacher.pretrained to the file"
            ) from error
    path = Path(section.pretrained).expanduser()
    if not path.is_file():
        tags = open_clip.list_pretrained_tags_by_model(section.model)
        raise RecipeError(
            f"teacher.pretrained {section.pretrained!r} is neither a file nor an open_clip tag of "
            f"{section.model} (tags: {', '.join(tags) or 'none'})"
        )
    return path
