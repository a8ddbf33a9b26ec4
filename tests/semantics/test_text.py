"""Prompts, the text tower and the cache of embeddings; weights are never random by accident."""

import pickle
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.errors import RecipeError, StorageError
from pipeline.recipe import Teacher
from pipeline.semantics import text
from pipeline.semantics.clip import encode_text, load_clip, model_config, new_clip
from pipeline.semantics.text import templates, text_embeddings

NAMES = ["striped_teal_ring", "bow_(weapon)", "dog"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    save_file(new_clip("miniature-rn").state_dict(), path)
    return path


def section(weights: Path | str, **changes: object) -> Teacher:
    return Teacher.model_validate(
        {"model": "miniature-rn", "pretrained": str(weights), "prompts": "seven", **changes}
    )


@pytest.mark.parametrize(("prompts", "number"), [("single", 1), ("seven", 7), ("ensemble", 81)])
def test_templates_are_distinct_and_take_one_name(prompts: str, number: int) -> None:
    found = templates(prompts)
    assert len(set(found)) == len(found) == number
    assert all(pattern.format("X").count("X") == 1 for pattern in found)


def test_embeddings_follow_the_zero_shot_recipe(weights: Path, tmp_path: Path) -> None:
    """Against open_clip's own encode_text at full length, normalised per prompt, then again."""
    ours = text_embeddings(section(weights), NAMES, None, tmp_path)
    model = load_clip(section(weights), None)
    tokenizer = open_clip.get_tokenizer("miniature-rn")
    for name, row in zip(["striped teal ring", "bow (weapon)", "dog"], ours, strict=True):
        rows = model.encode_text(
            tokenizer([p.format(name) for p in templates("seven")]), normalize=True
        )
        expected = torch.nn.functional.normalize(rows.mean(dim=0), dim=0)
        torch.testing.assert_close(row, expected, atol=1e-6, rtol=0)
    assert ours.dtype == torch.float32 and ours.shape == (3, 64)


def test_cutting_to_the_longest_text_is_exact(weights: Path) -> None:
    model = load_clip(section(weights), None)
    tokens = open_clip.get_tokenizer("miniature-rn")(["a dog.", "a photo of a striped teal ring."])
    expected = model.encode_text(tokens, normalize=True)
    torch.testing.assert_close(encode_text(model, tokens), expected, atol=1e-6, rtol=0)


def test_cache_is_keyed_by_content(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = text_embeddings(section(weights), NAMES, None, tmp_path)
    other_weights = tmp_path / "other.safetensors"
    state = {key: tensor * 1.1 for key, tensor in load_file(weights).items()}
    save_file(state, other_weights)
    with monkeypatch.context() as patch:
        patch.setattr(text, "_embed", lambda *_: pytest.fail("computed again"))
        again = text_embeddings(section(weights), NAMES, None, tmp_path)
        assert torch.equal(first, again)
    for changed in (
        text_embeddings(section(weights, prompts="single"), NAMES, None, tmp_path),
        text_embeddings(section(other_weights), NAMES, None, tmp_path),
        text_embeddings(section(weights), NAMES[::-1], None, tmp_path),
    ):
        assert not torch.equal(changed, first)
    assert len(list(tmp_path.glob("text_*.safetensors"))) == 4
    assert not list(tmp_path.glob("*.tmp"))


def test_empty_vocabulary_is_refused(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no categories"):
        text_embeddings(section(weights), [], None, tmp_path)


def test_weights_must_exist_and_fit(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="neither a file nor an open_clip tag"):
        load_clip(section(tmp_path / "absent.pt"), None)
    with pytest.raises(RecipeError, match=r"weights of teacher\.model 'RN50'"):
        load_clip(section(weights, model="RN50"), None)
    state = load_file(weights)
    state.pop("logit_scale")
    save_file(state, tmp_path / "short.safetensors")
    with pytest.raises(RecipeError, match="logit_scale"):
        load_clip(section(tmp_path / "short.safetensors"), None)


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (eval, ("open('executed', 'w')",))


def test_a_pickle_with_code_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.pt"
    torch.save({"state_dict": _Evil()}, path)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(_Evil()))
    for name in ("evil.pt", "plain.pt"):
        with pytest.raises(RecipeError, match="without running code"):
            load_clip(section(tmp_path / name), None)
    assert not (tmp_path / "executed").exists()


def test_models_without_an_attention_pool_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"ViT-B-32.*attention pool.*RN50"):
        model_config("ViT-B-32")
    with pytest.raises(RecipeError, match=r"'RN5O'.*did you mean 'RN50"):
        model_config("RN5O")


def test_openai_weights_get_the_quick_gelu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tag says how its weights were trained; the plain model name alone would be wrong."""
    asked: list[bool] = []

    def fake(name: str, *, quick_gelu: bool = False) -> torch.nn.Module:
        asked.append(quick_gelu)
        return new_clip("miniature-rn")

    def offline(config: dict) -> str:
        raise RuntimeError("no network")

    monkeypatch.setattr("pipeline.semantics.clip.new_clip", fake)
    monkeypatch.setattr(open_clip, "download_pretrained", lambda config: "somewhere.pt")
    monkeypatch.setattr(open_clip, "load_checkpoint", lambda *args, **kwargs: None)
    load_clip(Teacher(), None)
    assert asked == [True]
    monkeypatch.setattr(open_clip, "download_pretrained", offline)
    with pytest.raises(StorageError, match=r"no network.*teacher\.pretrained"):
        load_clip(Teacher(), None)
