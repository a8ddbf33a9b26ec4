"""Plain ViTs in windows: equal to timm's own where they must be, and to hand-made windows."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from pipeline import recipe
from pipeline.detectors.backbone import Backbone
from pipeline.detectors.backbone import vit as windowed
from pipeline.detectors.backbone.pyramid import SimplePyramid
from pipeline.detectors.backbone.vit import Windows, evenly_spaced, run_vit
from pipeline.errors import RecipeError

Make = Callable[..., recipe.Backbone]

EVERY_WINDOW = Windows(1000, frozenset())
GLOBAL_ONLY = Windows(2, frozenset(range(100)))

# Absolute positions with class token, with registers, rotary (plain, mixed, DINOv3), distilled.
PLAIN = [
    "vit_tiny_patch16_224",
    "test_vit4",
    "eva02_tiny_patch14_224",
    "vit_small_patch16_rope_mixed_224",
    "vit_small_patch16_dinov3",
    "deit_tiny_distilled_patch16_224",
]
SHORT: dict[str, Any] = {"depth": 3}


def body_of(make: Make, name: str, **changes: Any) -> VisionTransformer | Eva:
    torch.manual_seed(0)
    options: dict[str, Any] = {"out_indices": [2], "global_blocks": 1, "arguments": SHORT} | changes
    body = Backbone(make(name, **options)).eval().body
    assert isinstance(body, VisionTransformer | Eva)
    for key, parameter in body.named_parameters():
        # Fresh layer scales are near 0 and would hide what attention does.
        if "gamma" in key:
            torch.nn.init.ones_(parameter)
    return body


def images_of(body: VisionTransformer | Eva, height: int, width: int) -> Tensor:
    patch = body.patch_embed.patch_size[0]
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, height * patch, width * patch, generator=generator)


@pytest.mark.parametrize("windows", [EVERY_WINDOW, GLOBAL_ONLY], ids=["one-window", "global"])
@pytest.mark.parametrize("name", PLAIN)
def test_one_window_or_global_blocks_give_timms_own_features(
    name: str, windows: Windows, section: Make
) -> None:
    body = body_of(section, name)
    images = images_of(body, 5, 7)
    with torch.no_grad():
        ours = run_vit(body, images, windows)
        tokens = body.forward_features(images)[:, body.num_prefix_tokens :]
    theirs = tokens.transpose(1, 2).reshape(ours.shape)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["vit_small_patch16_rope_mixed_224", "vit_small_patch16_dinov3"])
def test_rotary_positions_of_a_window_are_right_wherever_it_lies(name: str, section: Make) -> None:
    """A block gives each window what it gives with the rotary embeddings of its own place."""
    body = body_of(section, name)
    grid = windowed._Grid(6, 9, 3, 3, body.num_prefix_tokens)
    rope = body.rope.get_embed(shape=(6, 9))
    rope = rope[0] if body.rope_mixed else rope
    x = torch.randn(1, body.num_prefix_tokens + 54, body.embed_dim)
    with torch.no_grad():
        ours = windowed._run_in_windows(body.blocks[0], x, rope, grid)
        prefix, patches = x[:, : grid.num_prefix], x[:, grid.num_prefix :].view(6, 9, -1)
        places = rope.view(*rope.shape[:-2], 6, 9, -1)
        tokens = []
        for top in (0, 3):
            for left in (0, 3, 6):
                inside = patches[top : top + 3, left : left + 3].reshape(1, 9, -1)
                own = places[..., top : top + 3, left : left + 3, :].flatten(-3, -2)
                out = body.blocks[0](torch.cat([prefix, inside], 1), rope=own)
                tokens.append(out[:, : grid.num_prefix])
                expected = out[:, grid.num_prefix :].view(3, 3, -1)
                found = ours[0, grid.num_prefix :].view(6, 9, -1)
                found = found[top : top + 3, left : left + 3]
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    # The tokens before the patches are the mean of what the six windows made of them.
    torch.testing.assert_close(ours[:, : grid.num_prefix], torch.stack(tokens).mean(0))


@pytest.mark.parametrize("name", ["test_vit4", "eva02_tiny_patch14_224"])
def test_padding_of_windows_changes_nothing_inside(name: str, section: Make) -> None:
    """A window at the edge attends to its real patches as if it were that small."""
    body = body_of(section, name)
    count = body.num_prefix_tokens
    grid = windowed._Grid(4, 5, 3, 3, count)
    x = torch.randn(2, count + 20, body.embed_dim)
    rope = body.rope.get_embed(shape=(4, 5)) if isinstance(body, Eva) else None
    with torch.no_grad():
        ours = windowed._run_in_windows(body.blocks[0], x, rope, grid)[:, count:].view(2, 4, 5, -1)
        corner = x[:, count:].view(2, 4, 5, -1)[:, 3:, 3:].flatten(1, 2)
        tokens = torch.cat([x[:, :count], corner], 1)
        options = {} if rope is None else {"rope": rope.view(4, 5, -1)[3:, 3:].flatten(0, 1)}
        expected = body.blocks[0](tokens, **options)[:, count:].view(2, 1, 2, -1)
    torch.testing.assert_close(ours[:, 3:, 3:], expected, rtol=1e-4, atol=1e-5)


def test_windows_keep_what_happens_in_them_until_a_global_block(section: Make) -> None:
    for windows, reach in ((Windows(2, frozenset()), False), (Windows(2, frozenset({2})), True)):
        body = body_of(
            section,
            "vit_small_patch16_224",
            arguments=SHORT | {"class_token": False, "global_pool": "avg"},
        )
        images = images_of(body, 4, 4).requires_grad_()
        run_vit(body, images, windows)[:, :, 0, 0].sum().backward()
        assert images.grad is not None
        touched = images.grad.abs().amax((0, 1)).view(4, 16, 4, 16).amax((1, 3)) > 0
        assert touched[:2, :2].all() and touched[2:].any() == reach and touched.any()


def test_global_blocks_are_evenly_spaced() -> None:
    # ViTDet, appendix: subsets of 12, 24 and 32 blocks, the last of each of four is global.
    assert evenly_spaced(12, 4) == {2, 5, 8, 11}
    assert evenly_spaced(24, 4) == {5, 11, 17, 23}
    assert evenly_spaced(32, 4) == {7, 15, 23, 31}
    assert evenly_spaced(6, 0) == frozenset() and evenly_spaced(3, 3) == {0, 1, 2}


def test_pyramid_has_the_layers_of_vitdet() -> None:
    pyramid = SimplePyramid(32, [0, 1, 2, 3])
    maps = pyramid(torch.randn(1, 32, 6, 5))
    assert [tuple(x.shape[1:]) for x in maps] == [
        (256, 24, 20),
        (256, 12, 10),
        (256, 6, 5),
        (256, 3, 3),
    ]
    kinds = [[type(part).__name__ for part in level] for level in pyramid.levels]
    tail = ["Conv2d", "ChannelNorm", "Conv2d", "ChannelNorm"]
    assert kinds == [
        ["ConvTranspose2d", "ChannelNorm", "GELU", "ConvTranspose2d", *tail],
        ["ConvTranspose2d", *tail],
        tail,
        ["MaxPool", *tail],
    ]
    # Normed over channels at each cell: mean 0 and variance 1 with fresh weights.
    for level in maps:
        assert level.mean(1).abs().max() < 1e-5
        torch.testing.assert_close(
            level.var(1, correction=0), torch.ones_like(level[:, 0]), rtol=1e-2, atol=1e-2
        )


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("beit_base_patch16_224", {"out_indices": [1]}, "Beit"),
        ("test_vit", {"out_indices": [2, 4]}, r"out_indices \[2, 4\] has 4.*\[1, 2, 3\]"),
        (
            "test_vit",
            {"out_indices": [1], "global_blocks": 99},
            "global_blocks is 99, but test_vit",
        ),
        ("resnet10t", {"window_size": 14}, "window_size is 14, and resnet10t is no plain ViT"),
        ("convnext_atto", {"global_blocks": 2}, "global_blocks is 2"),
        ("test_vit", {"out_indices": [1], "arguments": {"patch_drop_rate": 0.5}}, "patch_drop"),
    ],
)
def test_wrong_requests_are_explained(
    name: str, changes: dict[str, Any], message: str, section: Make
) -> None:
    with pytest.raises(RecipeError, match=message):
        Backbone(section(name, **changes))
