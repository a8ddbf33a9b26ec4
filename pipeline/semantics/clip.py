"""open_clip models by name: what is known of them before weights, and loading, never at random."""

import difflib
import hashlib
import json
import pickle
import warnings
from pathlib import Path
from typing import Any, TypeAlias

import open_clip
import safetensors
import torch
from torch import Tensor, nn

from pipeline.errors import RecipeError, StorageError
from pipeline.recipe import Teacher

ClipModel: TypeAlias = open_clip.CLIP | open_clip.CustomTextCLIP | open_clip.CoCa
"""Image tower `visual`, a text tower, and `logit_scale`."""

_CONFIGS = Path(__file__).parent / "model_configs"


def model_config(name: str) -> dict[str, Any]:
    """The config of an open_clip model; raises `RecipeError` with the nearest names for another."""
    if not set(_own_models()) <= set(open_clip.list_models()):
        open_clip.add_model_config(_CONFIGS)
    known = {model.lower(): model for model in open_clip.list_models()}
    if name not in known.values():
        close = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.4)
        nearest = " or ".join(repr(known[model]) for model in close)
        hint = f"did you mean {nearest}?" if close else "open_clip.list_models() lists them"
        raise RecipeError(f"teacher.model {name!r} is no open_clip model; {hint}")
    return dict(open_clip.get_model_config(name))


def new_clip(name: str, *, quick_gelu: bool = False) -> ClipModel:
    """The model with random weights: only to be trained, or to have weights loaded into it.

    Raises `StorageError` where its text tower needs files that are not here.
    """
    config = model_config(name)
    config["quick_gelu"] = bool(config.get("quick_gelu")) or quick_gelu
    foreign = config["text_cfg"].get("hf_model_name")
    own_text = bool(config.pop("custom_text", False)) or foreign is not None
    if not own_text:
        return open_clip.CLIP(**config)
    if foreign is not None:
        config["text_cfg"]["hf_model_pretrained"] = False
    kind = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP
    try:
        return kind(**config)
    except (OSError, RuntimeError, ImportError) as error:
        if foreign is None:
            raise
        raise StorageError(
            f"the text tower of teacher.model {name!r} needs the config of {foreign} "
            f"({short(error)}); {how_to_get(foreign)}"
        ) from error


def load_clip(section: Teacher, weights: Path | None) -> ClipModel:
    """The teacher's model in evaluation mode, without gradients, float32.

    `weights` is the file of a teacher trained here; without it `section.pretrained` is loaded.
    Raises `RecipeError` where that is neither a tag nor a file, or does not fit the model.
    """
    tag = _tag_config(section) if weights is None else {}
    path = weights if weights is not None else _weights_path(section, tag)
    # OpenAI's weights were trained with the quick GELU, which the plain model names do not use.
    model = new_clip(section.model, quick_gelu=bool(tag.get("quick_gelu")))
    _load_weights(model, section, path, "cpu")
    return model.eval().requires_grad_(False)


def check_weights(section: Teacher) -> None:
    """Raise what `load_clip` would of a local file, before anything is spent: keys and shapes are
    compared on the meta device. Of a published tag nothing is asked, for it would be downloaded.
    """
    if _tag_config(section):
        return
    path = _weights_path(section, {})
    with torch.device("meta"):
        model = new_clip(section.model)
    # A .safetensors file is mapped, so only its header is read; it knows no meta device.
    device = "cpu" if path.suffix == ".safetensors" else "meta"
    with warnings.catch_warnings():
        # Of each mapped tensor torch says that nothing was copied, which is what is wanted.
        warnings.simplefilter("ignore", UserWarning)
        _load_weights(model, section, path, device)


def pixel_statistics(section: Teacher) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the pixels, as fractions, that the weights were trained on.

    A local file is taken to be like the first weights that were published of its model.
    """
    tag = _tag_config(section)
    if not tag:
        model_config(section.model)
        tags = open_clip.list_pretrained_tags_by_model(section.model)
        tag = open_clip.get_pretrained_cfg(section.model, tags[0]) if tags else {}
    mean = tag.get("mean") or open_clip.OPENAI_DATASET_MEAN
    std = tag.get("std") or open_clip.OPENAI_DATASET_STD
    return tuple(mean), tuple(std)


def temperature(model: ClipModel) -> float:
    """What cosines are multiplied by before a softmax over categories: exp(logit_scale).

    CLIP was trained with at most 100. A model with a bias beside the scale (SigLIP) has no such
    limit; its bias is the same for all categories, so the softmax takes it out.
    """
    scale = float(model.logit_scale.exp())
    return scale if model.logit_bias is not None else min(scale, 100.0)


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


def encode_text(model: ClipModel, tokens: Tensor) -> Tensor:
    """Unit rows (N, D) for (N, L) tokens."""
    causal = isinstance(model, open_clip.CLIP) and model.attn_mask is not None
    if causal and model.text_pool_type == "argmax":
        return nn.functional.normalize(text_features(model, tokens), dim=-1)
    return model.encode_text(tokens, normalize=True)


def text_features(model: open_clip.CLIP, tokens: Tensor) -> Tensor:
    """What the text tower gives, (N, D), for (N, L) tokens, over the longest text of them only.

    Attention is causal and the end token is the largest, so cutting off padding changes nothing.
    """
    assert model.attn_mask is not None and model.text_pool_type == "argmax"
    length = int(tokens.argmax(dim=-1).max()) + 1
    states = model.token_embedding(tokens[:, :length]) + model.positional_embedding[:length]
    states = model.transformer(states, attn_mask=model.attn_mask[:length, :length])
    states = model.ln_final(states)
    ends = tokens.argmax(dim=-1)
    pooled = states[torch.arange(len(tokens), device=tokens.device), ends]
    return pooled @ model.text_projection


def short(error: Exception) -> str:
    """What an error of somebody else's says, in one line that is not endless."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def how_to_get(repository: str) -> str:
    """What to do where files of the Hugging Face hub cannot be had."""
    return (
        "`pip install transformers`, and where there is no network, fetch them elsewhere with "
        f"`hf download {repository}`, copy that cache here and set HF_HOME to it"
    )


def _own_models() -> list[str]:
    return [path.stem for path in sorted(_CONFIGS.glob("*.json"))]


def _tag_config(section: Teacher) -> dict[str, Any]:
    """open_clip's facts on a published tag; empty for a local file or a teacher of our own."""
    if section.pretrained is None:
        return {}
    return dict(open_clip.get_pretrained_cfg(section.model, section.pretrained))


def _load_weights(model: ClipModel, section: Teacher, path: Path, device: str) -> None:
    try:
        open_clip.load_checkpoint(model, str(path), strict=True, weights_only=True, device=device)
    except (
        AssertionError,  # open_clip, where the text tower is of another width
        RuntimeError,
        KeyError,
        AttributeError,
        TypeError,
        ValueError,
        pickle.UnpicklingError,
        safetensors.SafetensorError,
        StopIteration,
        EOFError,
    ) as error:
        raise RecipeError(
            f"{path} does not hold weights of teacher.model {section.model!r} that load without "
            f"running code ({short(error)}); give a state dict as .safetensors or .pt"
        ) from error


def _weights_path(section: Teacher, tag: dict[str, Any]) -> Path:
    assert section.pretrained is not None, "a teacher without `pretrained` is trained first"
    if tag:
        try:
            return Path(open_clip.download_pretrained(tag))
        except (OSError, RuntimeError, ImportError) as error:
            other = f"{section.model}-quickgelu"
            quick = ""
            if tag.get("quick_gelu") and other in open_clip.list_models():
                quick = f", and teacher.model to {other}, which a tag implies and a file does not"
            raise StorageError(
                f"cannot download {section.model} weights {section.pretrained!r} ({error}); "
                f"download them elsewhere and set teacher.pretrained to the file{quick}"
            ) from error
    path = Path(section.pretrained).expanduser()
    if not path.is_file():
        tags = open_clip.list_pretrained_tags_by_model(section.model)
        raise RecipeError(
            f"teacher.pretrained {section.pretrained!r} is neither a file nor an open_clip tag of "
            f"{section.model} (tags: {', '.join(tags) or 'none'})"
        )
    return path
