"""Small models of every kind of image tower, with weights in which everything plays a part."""

from pathlib import Path

import open_clip
import timm
import torch
from safetensors.torch import save_file
from timm.models import register_model
from timm.models.convnext import ConvNeXt
from timm.models.vision_transformer import VisionTransformer

from pipeline.recipe import Teacher
from pipeline.semantics.clip import ClipModel, model_config, new_clip

_CONFIGS = Path(__file__).parent / "model_configs"
DENSE = [
    "miniature-rn", "miniature-vit", "miniature-vit-mean", "miniature-map", "miniature-convnext"
]  # fmt: skip
ALL = [*DENSE, "miniature-captioner"]


@register_model
def vit_miniature_siglip_32(**options: object) -> VisionTransformer:
    unwanted = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}
    kept = {key: value for key, value in options.items() if key not in unwanted}
    return VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, class_token=False, **kept
    )


@register_model
def convnext_miniature(**options: object) -> ConvNeXt:
    model = ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16))
    model.default_cfg = {"pool_size": (7, 7)}
    return model


def known() -> None:
    """Tell open_clip of these models, once."""
    assert timm.is_model("vit_miniature_siglip_32")
    if "miniature-vit" not in open_clip.list_models():
        open_clip.add_model_config(_CONFIGS)


def stirred(name: str) -> ClipModel:
    """A model none of whose gains, offsets and embeddings are at their initial values."""
    known()
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = new_clip(name)
    for key, tensor in model.state_dict().items():
        if not tensor.is_floating_point() or "logit" in key:
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if key.endswith("running_var"):
            tensor.copy_(noise.abs() + 0.5)
        elif key.endswith("gamma"):
            tensor.copy_(noise)
        else:
            tensor.add_(0.2 * noise)
    return model.eval()


def written(name: str, folder: Path, **options: object) -> Teacher:
    """The recipe's section for such a model, its weights in a file."""
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        save_file({k: v.contiguous() for k, v in stirred(name).state_dict().items()}, path)
    values = {"model": name, "pretrained": str(path), "prompts": "single", **options}
    return Teacher.model_validate(values)


def width_of(name: str) -> int:
    known()
    return int(model_config(name)["embed_dim"])
