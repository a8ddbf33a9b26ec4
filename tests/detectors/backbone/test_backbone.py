"""The backbone on pyramids: sizes, norms, frozen stages, learning rates, recomputation."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline import recipe
from pipeline.detectors.backbone import Backbone, group_norm
from pipeline.detectors.backbone.norms import FoldedConvolution, FoldedNorm
from pipeline.errors import RecipeError
from pipeline.recipe import Training
from pipeline.training.engine import parameter_groups

Make = Callable[..., recipe.Backbone]


def test_maps_and_masks_have_the_strides_of_the_model(section: Make) -> None:
    backbone = Backbone(section())
    mask = torch.zeros(2, 64, 96, dtype=torch.bool)
    mask[:, 32:] = True
    maps = backbone(torch.randn(2, 3, 64, 96), mask)
    assert [tuple(level.features.shape) for level in maps] == [
        (2, 128, 8, 12),
        (2, 256, 4, 6),
        (2, 512, 2, 3),
    ]
    for level in maps:
        height = level.features.shape[2]
        assert not level.mask[:, : height // 2].any() and level.mask[:, height // 2 :].all()


def test_maps_with_channels_last_are_turned(section: Make) -> None:
    backbone = Backbone(
        section(
            "swin_tiny_patch4_window7_224",
            norm="own",
            out_indices=[1, 2],
            arguments={"img_size": 64, "embed_dim": 24, "window_size": 4},
        )
    )
    maps = backbone(torch.randn(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.bool))
    assert [tuple(m.features.shape) for m in maps] == [(1, 48, 8, 8), (1, 96, 4, 4)]


def test_group_norm_takes_the_place_of_batch_norm(section: Make) -> None:
    body = Backbone(section()).body
    kinds = [type(module) for module in body.modules()]
    assert nn.GroupNorm in kinds and not any(issubclass(kind, nn.BatchNorm2d) for kind in kinds)
    groups = {width: group_norm(width).num_groups for width in (256, 128, 96, 64, 48, 20, 3)}
    assert groups == {256: 32, 128: 32, 96: 16, 64: 16, 48: 8, 20: 4, 3: 1}


@pytest.mark.parametrize("name", ["resnet10t", "test_efficientnet"])
def test_frozen_batch_norm_neither_trains_nor_counts(name: str, section: Make) -> None:
    backbone = Backbone(section(name, norm="frozen")).train()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    backbone(torch.randn(2, 3, 32, 32), torch.zeros(2, 32, 32, dtype=torch.bool))
    for key, value in backbone.state_dict().items():
        assert torch.equal(before[key], value), key
    assert not any("bn" in name for name, _ in backbone.named_parameters())


@pytest.mark.parametrize(
    ("name", "out_indices", "stages", "frozen"),
    [
        ("resnet10t", [2, 3, 4], 1, {"conv1", "bn1"}),
        ("resnet10t", [2, 3, 4], 2, {"conv1", "bn1", "layer1"}),
        ("test_convnext", [1, 2, 3], 1, {"stem_0", "stem_1"}),
        ("test_convnext", [1, 2, 3], 2, {"stem_0", "stem_1", "stages_0"}),
        ("resnet10t", [1, 2], 3, {"conv1", "bn1", "layer1", "layer2"}),
        ("swin_tiny_patch4_window7_224", [1, 2], 2, {"patch_embed", "layers_0"}),
        ("small_focalnet", [1, 2], 2, {"stem", "layers_0"}),
        ("test_efficientnet", [2, 3], 1, {"conv_stem", "bn1"}),
    ],
)
def test_leading_stages_are_frozen(
    name: str, out_indices: list[int], stages: int, frozen: set[str], section: Make
) -> None:
    body = Backbone(section(name, out_indices=out_indices, frozen_stages=stages)).body
    still = {key.split(".")[0] for key, p in body.named_parameters() if not p.requires_grad}
    moving = {key.split(".")[0] for key, p in body.named_parameters() if p.requires_grad}
    assert still == frozen and not still & moving


def with_statistics(backbone: Backbone) -> Backbone:
    """Batch norms of a trained model: neither mean 0 nor variance 1."""
    generator = torch.Generator().manual_seed(2)
    for name, tensor in backbone.body.state_dict().items():
        if name.endswith(("running_var", "bn1.weight", "bn2.weight")):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
        elif name.endswith(("running_mean", "bn1.bias", "bn2.bias")):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return backbone


@pytest.mark.parametrize("name", ["resnet10t", "resnet26", "resnet50"])
def test_folded_norms_give_the_maps_and_gradients_of_norms_that_follow(
    name: str, section: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, mask = torch.randn(1, 3, 64, 96), torch.zeros(1, 64, 96, dtype=torch.bool)
    wanted = section(name, norm="frozen", frozen_stages=2)

    def run() -> tuple[Backbone, list[Tensor], dict[str, Tensor]]:
        torch.manual_seed(0)
        backbone = with_statistics(Backbone(wanted))
        maps = [level.features for level in backbone(images, mask)]
        torch.stack([x.square().mean() for x in maps]).sum().backward()
        gradients = {k: p.grad for k, p in backbone.named_parameters() if p.grad is not None}
        return backbone, maps, gradients

    folded, maps, gradients = run()
    kinds = {type(module) for module in folded.modules()}
    assert {FoldedConvolution, FoldedNorm} <= kinds
    monkeypatch.setattr("pipeline.detectors.backbone.norms.fold_norms", lambda body: None)
    plain, expected_maps, expected_gradients = run()
    assert not any(isinstance(module, FoldedConvolution) for module in plain.modules())
    assert list(folded.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(maps, expected_maps, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-3, atol=1e-5)


def test_a_pass_of_frozen_stages_stores_nothing_for_the_backward(section: Make) -> None:
    def stored(frozen_stages: int) -> int:
        backbone = Backbone(section("resnet50", norm="frozen", frozen_stages=frozen_stages))
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, nn.Parameter):
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            backbone(torch.randn(1, 3, 128, 128), torch.zeros(1, 128, 128, dtype=torch.bool))
        return sum(sizes.values())

    assert stored(5) == 0
    assert stored(5) < stored(4) < stored(2) < stored(0)


@pytest.mark.parametrize(
    ("name", "changes", "stem", "layers"),
    [
        ("resnet26", {"norm": "frozen"}, ("conv1",), [2, 2, 2, 2]),
        ("convnext_atto", {"out_indices": [1, 2, 3]}, ("stem",), [2, 2, 6, 2]),
        ("small_focalnet", {"out_indices": [1, 2]}, ("stem",), [1, 1, 2]),
        (
            "swin_tiny_patch4_window7_224",
            {"out_indices": [1, 2, 3]},
            ("patch_embed",),
            [2, 2, 6, 2],
        ),
        (
            "vit_small_patch16_rope_mixed_ape_224",
            {"out_indices": [1]},
            ("patch_embed", "pos_embed", "cls_token", "rope"),
            [3, 3, 3, 3],
        ),
    ],
)
def test_learning_rates_fall_from_block_to_block_towards_the_stem(
    name: str, changes: dict[str, Any], stem: tuple[str, ...], layers: list[int], section: Make
) -> None:
    backbone = Backbone(section(name, layer_decay=0.5, **changes))
    rules = backbone.parameter_rules()
    assert list(rules) == [key for key, _ in backbone.named_parameters()]
    count = sum(layers)
    layer = {key: 0.0 for key in rules}
    for key, rule in rules.items():
        layer[key] = count + 1 + float(torch.tensor(rule.rate).log2())
    inside = {key.removeprefix("body."): v for key, v in layer.items() if key.startswith("body.")}
    assert {v for key, v in inside.items() if key.startswith(stem)} == {0.0}
    assert {v for key, v in inside.items() if not key.startswith(stem)} >= set(range(1, count + 1))
    # timm registers modules in the order of use, so the layers never fall along it.
    assert list(inside.values()) == sorted(inside.values())
    for key, value in layer.items():
        if not key.startswith("body."):
            assert value == count + 1, key
    undecayed = {key for key, rule in rules.items() if not rule.decayed}
    special = ("pos_embed", "cls_token", "relative_position_bias_table", "rope.freqs")
    for key, parameter in backbone.named_parameters():
        assert (key in undecayed) == (parameter.ndim < 2 or key.endswith(special)), key


def test_parameter_groups_take_the_rates_of_the_backbone(section: Make) -> None:
    backbone = Backbone(section("convnext_atto", out_indices=[1, 2, 3], layer_decay=0.8))
    student = nn.ModuleDict({"backbone": backbone, "head": nn.Linear(2, 2)})
    training = Training.model_validate(
        {"steps": 1, "learning_rate": 1.0, "backbone_learning_rate": 0.1, "weight_decay": 0.3}
    )
    groups = parameter_groups(student, training)
    names = {id(parameter): key for key, parameter in student.named_parameters()}
    found = {
        names[id(parameter)]: (group["lr"], group["base_lr"], group["weight_decay"])
        for group in groups
        for parameter in group["params"]
    }
    assert len(found) == len(names) == sum(len(group["params"]) for group in groups)
    stem = 0.1 * 0.8**13
    assert found["backbone.body.stem_0.weight"] == pytest.approx((stem, stem, 0.3))
    assert found["backbone.body.stem_0.bias"] == pytest.approx((stem, stem, 0.0))
    last = 0.1 * 0.8
    assert found["backbone.body.stages_3.blocks.1.mlp.fc1.weight"] == pytest.approx(
        (last, last, 0.3)
    )
    assert found["backbone.output_norms.0.weight"] == pytest.approx((0.1, 0.1, 0.0))
    assert found["head.weight"] == (1.0, 1.0, 0.3)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("resnet26", {"norm": "frozen"}),
        ("swin_tiny_patch4_window7_224", {"out_indices": [1, 2], "arguments": {"embed_dim": 24}}),
        ("convnextv2_atto", {"out_indices": [1, 2, 3]}),
        ("small_focalnet", {"out_indices": [1, 2]}),
        ("vit_tiny_patch16_224", {"out_indices": [1, 2], "arguments": {"depth": 4}}),
        ("eva02_tiny_patch14_224", {"out_indices": [1, 2], "window_size": 3}),
    ],
)
def test_checkpointed_stages_store_less_and_change_no_gradient(
    name: str, changes: dict[str, Any], section: Make
) -> None:
    def run(stages: int) -> tuple[dict[str, Tensor], int]:
        torch.manual_seed(0)
        backbone = Backbone(section(name, checkpointed_stages=stages, drop_path=0.3, **changes))
        stored = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal stored
            stored += tensor.numel()
            return tensor

        torch.manual_seed(1)  # the same blocks are skipped
        images = torch.randn(2, 3, 70, 101)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            maps = backbone.train()(images, torch.zeros(2, 70, 101, dtype=torch.bool))
        torch.stack([level.features.square().mean() for level in maps]).sum().backward()
        return {k: p.grad for k, p in backbone.named_parameters() if p.grad is not None}, stored

    plain, kept = run(0)
    some, fewer = run(1)
    every, fewest = run(len(changes["out_indices"]) if "small" in name else 2)
    assert fewest < fewer < kept
    for gradients in (some, every):
        torch.testing.assert_close(gradients, plain, rtol=1e-5, atol=1e-7)


def test_drop_path_reaches_the_blocks_and_replaces_timms_default(section: Make) -> None:
    def rates(drop_path: float) -> list[float]:
        body = Backbone(section("small_focalnet", out_indices=[1, 2], drop_path=drop_path)).body
        return [float(m.drop_prob) for m in body.modules() if type(m).__name__ == "DropPath"]

    assert rates(0.0) == []
    assert max(rates(0.3)) == pytest.approx(0.3) and rates(0.3) == sorted(rates(0.3))


def test_output_norms_stand_where_a_family_has_no_batch_norm(section: Make) -> None:
    maps = {}
    for wanted in (None, False):
        torch.manual_seed(0)
        backbone = Backbone(section("convnext_atto", out_indices=[1, 2], output_norm=wanted))
        images = torch.randn(1, 3, 64, 64)
        maps[wanted] = backbone(images, torch.zeros(1, 64, 64, dtype=torch.bool))
    for level in maps[None]:
        assert level.features.mean(1).abs().max() < 1e-5
    assert maps[False][0].features.mean(1).abs().max() > 1e-4
    assert Backbone(section()).output_norms is None
    assert Backbone(section(output_norm=True)).output_norms is not None
    assert Backbone(section("test_vit", out_indices=[1])).output_norms is None


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("resnet51", {}, "resnet51' is no model of timm.*nearest are .*resnet50"),
        ("hf-hub:timm/resnet50.a1_in1k", {}, "address belongs to detector.backbone.weights"),
        ("resnet50.no_such_tag", {}, "tag 'no_such_tag'.*a1_in1k"),
        ("resnet10t", {"out_indices": [2, 9]}, r"out_indices \[2, 9\].*has no map 9"),
        ("convnext_atto", {"out_indices": [1, 4]}, "has no map 4"),
        ("resnet10t", {"frozen_stages": 7}, "frozen_stages is 7.* has 5 stages"),
        ("resnet10t", {"checkpointed_stages": 5}, "checkpointed_stages is 5.* has 4 stages"),
        ("resnet10t", {"checkpointed_stages": 1, "norm": "own"}, "counts its statistics twice"),
        ("test_efficientnet", {"checkpointed_stages": 1}, "does not run stage by stage"),
        ("convnext_atto", {"out_indices": [1], "norm": "group"}, "no batch norm to replace"),
        ("resnet10t", {"arguments": {"no_such": 1}}, "no_such"),
        ("resnet10t", {"arguments": {"act_layer": "no_such"}}, "cannot be made: 'no_such'"),
        ("resnet10t", {"arguments": {"block": "no_such"}}, "cannot be made: 'str' object"),
        ("resnet10t", {"arguments": {"in_chans": 1}}, "arguments has in_chans"),
        ("resnet10t", {"arguments": {"checkpoint_path": "x.pth"}}, "detector.backbone.weights"),
        ("vgg11", {"arguments": {"drop_path_rate": 0.1}}, "detector.backbone.drop_path;"),
    ],
)
def test_wrong_requests_are_explained(
    name: str, changes: dict[str, Any], message: str, section: Make
) -> None:
    with pytest.raises(RecipeError, match=message):
        Backbone(section(name, **changes))


@pytest.mark.parametrize("indices", [[3, 2], [2, 2, 3]])
def test_maps_go_on_finest_first(indices: list[int], section: Make) -> None:
    with pytest.raises(ValueError, match="must rise"):
        section(out_indices=indices)
