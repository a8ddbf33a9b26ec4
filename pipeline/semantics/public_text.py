"""Text embeddings as the official RichSem makes them, from the CLIP that its checkpoints carry."""

from collections.abc import Mapping, Sequence

import open_clip
import torch
from torch import Tensor

from pipeline.errors import DataError
from pipeline.progress import Progress
from pipeline.semantics.clip import new_clip, text_features

_CLIP = "class_embed.clip."
_TEXT_TOWER = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_proj")
_NAMES_AT_ONCE = 8


@torch.no_grad()
def public_text_embeddings(
    state: Mapping[str, Tensor], names: Sequence[str], device: torch.device | str = "cpu"
) -> Tensor:
    """(C, D) float32 for category names as the data set writes them, not normalised.

    RichSem averages what the text tower gives for 81 prompts, OpenAI's 80 for ImageNet and the bare
    name, and keeps the length of the mean. The tower is the copy in the checkpoint's own `state`;
    raises `DataError` where that has none, or of another model than RN50.
    """
    model = _text_tower(state).to(device)
    tokenizer = open_clip.get_tokenizer("RN50")
    prompts = (*open_clip.OPENAI_IMAGENET_TEMPLATES, "{}.".format)
    rows = []
    with Progress("text embeddings", "names") as progress:
        for first in range(0, len(names), _NAMES_AT_ONCE):
            some = names[first : first + _NAMES_AT_ONCE]
            tokens = tokenizer([prompt(name) for name in some for prompt in prompts]).to(device)
            features = text_features(model, tokens).view(len(some), len(prompts), -1)
            rows.append(features.mean(1).cpu())
            progress.update(first + len(some), len(names))
    return torch.cat(rows)


def _text_tower(state: Mapping[str, Tensor]) -> open_clip.CLIP:
    tower = {
        name.removeprefix(_CLIP): tensor
        for name, tensor in state.items()
        if name.startswith(_CLIP) and name.removeprefix(_CLIP).startswith(_TEXT_TOWER)
    }
    model = new_clip("RN50", quick_gelu=True)
    wanted = {k: v.shape for k, v in model.state_dict().items() if k.startswith(_TEXT_TOWER)}
    if {name: tensor.shape for name, tensor in tower.items()} != wanted:
        raise DataError(
            f"the checkpoint has {len(tower)} tensors of a text tower under {_CLIP}, not the "
            f"{len(wanted)} of CLIP RN50, and RichSem's columns are text embeddings that it makes "
            "with them. Import it without --annotations: training from it takes the text "
            "embeddings of the recipe's teacher"
        )
    model.load_state_dict(tower, strict=False)
    return model.eval()
