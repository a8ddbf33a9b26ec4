"""Weights from files and the hub: timm's converters, strict comparison, errors that name keys."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline import recipe
from pipeline.detectors.backbone import Backbone, weights
from pipeline.errors import DataError, RecipeError, StorageError

Make = Callable[..., recipe.Backbone]


def donor(name: str, **options: Any) -> dict[str, Tensor]:
    torch.manual_seed(1)
    state: dict[str, Tensor] = timm.create_model(name, pretrained=False, **options).state_dict()
    return state


@pytest.mark.parametrize("kind", ["plain.safetensors", "plain.pth", "wrapped.pth", "module.pth"])
def test_weights_come_from_a_local_file(kind: str, tmp_path: Path, section: Make) -> None:
    state = donor("resnet10t")
    path = tmp_path / kind
    if kind == "plain.safetensors":
        save_file(state, path)
    elif kind == "wrapped.pth":
        other = {key: torch.zeros_like(value) for key, value in state.items()}
        tree = {"state_dict": other, "state_dict_ema": state, "args": argparse.Namespace(lr=1)}
        torch.save(tree, path)
    elif kind == "module.pth":
        torch.save({"model": {f"module.{key}": value for key, value in state.items()}}, path)
    else:
        torch.save(state, path)
    body = Backbone(section(weights=str(path), norm="frozen")).body.state_dict()
    assert torch.equal(body["layer3.0.conv1.weight"], state["layer3.0.conv1.weight"])
    assert torch.equal(body["bn1.running_var"], state["bn1.running_var"])
    random = Backbone(section(weights=str(path)), pretrained=False).body.state_dict()
    assert not torch.equal(random["layer3.0.conv1.weight"], body["layer3.0.conv1.weight"])


def test_positional_embeddings_of_another_size_are_resampled(tmp_path: Path, section: Make) -> None:
    state = donor("vit_tiny_patch16_224", depth=1)
    save_file(state, tmp_path / "vit.safetensors")
    body = Backbone(
        section(
            "vit_tiny_patch16_224",
            out_indices=[2],
            global_blocks=1,
            weights=str(tmp_path / "vit.safetensors"),
            arguments={"depth": 1, "img_size": 320},
        )
    ).body.state_dict()
    assert body["pos_embed"].shape == (1, 1 + 20 * 20, 192)
    torch.testing.assert_close(body["pos_embed"][:, 0], state["pos_embed"][:, 0])
    torch.testing.assert_close(
        body["pos_embed"][:, 1:].mean(1), state["pos_embed"][:, 1:].mean(1), atol=2e-3, rtol=0
    )


def test_names_of_dinov3_and_eva02_are_converted(tmp_path: Path, section: Make) -> None:
    """The authors' names, as their files have them (facebookresearch/dinov3, baaivision/EVA)."""
    renamed = {
        "vit_small_patch16_dinov3": {
            "reg_token": "storage_tokens",
            "gamma_1": "ls1.gamma",
            "gamma_2": "ls2.gamma",
        },
        "eva02_tiny_patch14_224": {
            "mlp.fc1_g": "mlp.w1",
            "mlp.fc1_x": "mlp.w2",
            "mlp.fc2": "mlp.w3",
        },
    }
    for name, names in renamed.items():
        state = donor(name, depth=2, num_classes=0)
        official = {}
        for key, value in state.items():
            for ours, theirs in names.items():
                key = key.replace(ours, theirs)
            official[key] = value
        assert set(official) != set(state)
        official["mask_token"] = torch.zeros(1, 1, 8)
        path = tmp_path / f"{name}.pth"
        torch.save({"model": official}, path)
        options = {"out_indices": [2], "global_blocks": 1, "arguments": {"depth": 2}}
        body = Backbone(section(name, weights=str(path), **options)).body.state_dict()
        for key, value in body.items():
            assert torch.equal(value, state[key]), key


def test_a_file_of_another_architecture_is_refused_by_its_keys(
    tmp_path: Path, section: Make
) -> None:
    def refusal(state: dict[str, Tensor], name: str = "resnet10t", **options: Any) -> str:
        save_file(state, tmp_path / "weights.safetensors")
        with pytest.raises(RecipeError) as caught:
            Backbone(section(name, weights=str(tmp_path / "weights.safetensors"), **options))
        return str(caught.value)

    whole = donor("resnet10t")
    lacking = {key: value for key, value in whole.items() if "layer4" not in key}
    told = refusal(lacking)
    names = [key for key in whole if "layer4" in key and "num_batches" not in key]
    assert f"{len(names)} missing: {', '.join(names[:10])} and {len(names) - 10} more" in told
    # Each tensor of the body is there, and more: a deeper model.
    told = refusal(donor("resnet14t"), norm="group")
    assert "not of resnet10t" in told
    deeper = whole | {"layer3.1.conv1.weight": torch.zeros(1)}
    assert "1 left over: layer3.1.conv1.weight" in refusal(deeper)
    wide = whole | {"conv1.0.weight": torch.zeros(3, 3, 3, 3)}
    assert "1 of another shape: conv1.0.weight (3, 3, 3, 3) for" in refusal(wide)
    headless = {key: value for key, value in whole.items() if not key.startswith("fc.")}
    save_file(headless | {"head.bias": torch.zeros(3)}, tmp_path / "good.safetensors")
    Backbone(section(weights=str(tmp_path / "good.safetensors")))
    assert "converter stops at" in refusal(
        {"stages.9.dwconv.weight": torch.zeros(2, 2)}, "convnext_atto", out_indices=[1]
    )


def test_a_body_on_the_meta_device_is_compared_all_the_same(tmp_path: Path, section: Make) -> None:
    state = donor("resnet10t")
    save_file(state, tmp_path / "weights.safetensors")
    wanted = section(weights=str(tmp_path / "weights.safetensors"))
    with torch.device("meta"):
        assert Backbone(wanted).body.state_dict()["conv1.0.weight"].is_meta
    del state["conv1.0.weight"]
    save_file(state, tmp_path / "weights.safetensors")
    with torch.device("meta"), pytest.raises(RecipeError, match=r"1 missing: conv1\.0\.weight"):
        Backbone(wanted)


def test_damaged_and_dangerous_files_are_refused(tmp_path: Path, section: Make) -> None:
    with pytest.raises(RecipeError, match="is no file"):
        Backbone(section(weights=str(tmp_path / "absent.pth")))
    torch.save({"model": donor("resnet10t"), "hook": Path("x")}, tmp_path / "object.pth")
    with pytest.raises(DataError, match="never executed"):
        Backbone(section(weights=str(tmp_path / "object.pth")))
    for name in ("short.safetensors", "short.pth"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 cut")
        with pytest.raises((StorageError, DataError), match=name):
            Backbone(section(weights=str(tmp_path / name)))


def test_the_hub_is_asked_for_the_address_of_the_recipe(
    section: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def answer(address: str, **options: Any) -> dict[str, Tensor]:
        asked.append((address, options))
        return donor("resnet10t")

    monkeypatch.setattr(weights, "load_state_dict_from_hf", answer)
    for address in ("hf-hub:timm/resnet10t.c3_in1k", "timm/resnet10t.c3_in1k"):
        body = Backbone(section(weights=address)).body.state_dict()
        assert torch.equal(body["conv1.0.weight"], donor("resnet10t")["conv1.0.weight"])
    assert asked == [("timm/resnet10t.c3_in1k", {"weights_only": True})] * 2


@pytest.mark.parametrize("address", ["hf-hub:timm/resnet10t.c3_in1k", "pretrained"])
def test_an_unreachable_hub_is_an_error_of_storage(
    address: str, section: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(StorageError, match=r"cannot be had from the hub.*local file"):
        Backbone(section(weights=address))


@pytest.mark.parametrize("text", ["hello", "(hello", "}q\x00s.", "0."])
def test_a_file_of_anything_else_is_no_weights(text: str, tmp_path: Path, section: Make) -> None:
    path = tmp_path / "text.pth"
    path.write_text(text)
    with pytest.raises(DataError, match="is no PyTorch file"):
        Backbone(section(weights=str(path)))


def test_an_empty_file_is_truncated(tmp_path: Path, section: Make) -> None:
    path = tmp_path / "empty.pth"
    path.touch()
    with pytest.raises(StorageError, match="cannot be read: EOFError; it may be truncated"):
        Backbone(section(weights=str(path)))
