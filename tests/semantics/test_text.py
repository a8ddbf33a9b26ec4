"""Prompts, the text tower and the cache of embeddings; weights are never random by accident."""

import pickle
import re
from pathlib import Path
from types import SimpleNamespace

import open_clip
import pytest
import torch
from miniature_towers import known, written
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import load_file, save_file

from pipeline.errors import RecipeError, StorageError
from pipeline.recipe import Teacher
from pipeline.semantics import text
from pipeline.semantics.clip import (
    encode_text,
    load_clip,
    model_config,
    new_clip,
    pixel_statistics,
)
from pipeline.semantics.text import cached_text, check_names, templates, text_embeddings

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


def test_progress_is_told_and_others_can_read_the_cache(weights: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    names = [f"thing {number}" for number in range(50)]
    given = section(weights)
    assert not cached_text(given, names, None, tmp_path).exists()
    text_embeddings(given, names, None, tmp_path, progress=lambda *news: told.append(news))
    assert told == [(256, 350), (350, 350)]
    path = cached_text(given, names, None, tmp_path)
    assert path.stat().st_mode & 0o444 == 0o444
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    path.write_bytes(b"12345")
    with pytest.raises(StorageError, match=r"text_.* is damaged .* delete it"):
        text_embeddings(given, names, None, tmp_path)


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


def test_weights_of_another_kind_of_tower_do_not_fit(tmp_path: Path) -> None:
    known()
    for name, other in [
        ("miniature-vit", "miniature-map"),
        ("miniature-map", "miniature-vit"),
        ("miniature-rn", "miniature-vit"),
        ("miniature-vit", "miniature-vit-mean"),
        ("miniature-convnext", "miniature-rn"),
    ]:
        given = written(name, tmp_path)
        with pytest.raises(RecipeError, match=rf"weights of teacher\.model '{other}'"):
            load_clip(given.model_copy(update={"model": other}), None)
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "empty.pt").touch()
    (tmp_path / "cut.pt").write_bytes((tmp_path / "list.pt").read_bytes()[:99])
    for name in ("list", "empty", "cut"):
        with pytest.raises(RecipeError, match=rf"{name}\.pt does not hold weights"):
            load_clip(section(tmp_path / f"{name}.pt"), None)


@pytest.mark.parametrize("name", ["miniature-map", "miniature-vit-mean", "miniature-captioner"])
def test_other_text_towers_follow_the_same_recipe(name: str, tmp_path: Path) -> None:
    given = written(name, tmp_path, prompts="seven")
    ours = text_embeddings(given, NAMES, None, tmp_path / "cache")
    model, tokenizer = load_clip(given, None), open_clip.get_tokenizer(name)
    rows = model.encode_text(tokenizer([p.format("dog") for p in templates("seven")]))
    rows = rows / rows.norm(dim=1, keepdim=True)
    expected = rows.mean(dim=0) / rows.mean(dim=0).norm()
    torch.testing.assert_close(ours[2], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("prompts", ["single", "seven", "ensemble"])
def test_names_that_the_tower_cannot_read_whole_are_named(prompts: str, tmp_path: Path) -> None:
    """77 tokens, two of them marks; the prompt's own words take some as well."""
    given = Teacher(prompts=prompts)
    extra = max(len(SimpleTokenizer().encode(p.format(""))) for p in templates(prompts))
    check_names(given, ["dog", "bow_(weapon)", " ".join(["dog"] * (75 - extra))])
    with pytest.raises(RecipeError, match=r"'dog dog .* is 78 tokens in the prompt .* reads 77"):
        check_names(given, ["dog", " ".join(["dog"] * (76 - extra))])
    for silent in ("_ _", "\u3000"):
        with pytest.raises(
            RecipeError, match=re.escape(f"category name {silent!r} gives no token")
        ):
            text_embeddings(given, ["dog", silent], None, tmp_path)


def test_the_longest_prompt_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "templates", lambda _: ["a {}.", "{}, and much more of it.", "{}"])
    with pytest.raises(RecipeError, match=r"is 78 tokens in the prompt '\{\}, and much more"):
        check_names(Teacher(), ["dog " * 69])
    check_names(Teacher(), ["dog " * 68])


class _Foreign:
    """Like open_clip's wrapper of a tokenizer of the Hugging Face hub: one token for each word."""

    @staticmethod
    def clean_fn(text: str) -> str:
        return text.strip(" .")

    @staticmethod
    def tokenizer(texts: list[str]) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[[*text.split(), "end"] for text in texts])


def test_names_are_counted_by_the_models_own_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda _: _Foreign())
    given = Teacher(model="ViT-B-16-SigLIP", pretrained="webli", prompts="single")
    check_names(given, ["dog " * 62])
    with pytest.raises(RecipeError, match=r"is 65 tokens in the prompt 'a \{\}\.', .* reads 64"):
        check_names(given, ["dog " * 63])
    with pytest.raises(RecipeError, match=r"'\.' gives no token"):
        check_names(given, ["."])


def test_a_tokenizer_that_is_not_here_can_be_brought(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str) -> None:
        raise OSError("no network")

    monkeypatch.setattr(open_clip, "get_tokenizer", offline)
    with pytest.raises(
        StorageError,
        match=r"tokenizer of its own, timm/ViT-B-16-SigLIP,.*no network.*pip install transformers"
        r".*hf download timm/ViT-B-16-SigLIP.*HF_HOME.*teacher\.text_embeddings",
    ):
        check_names(Teacher(model="ViT-B-16-SigLIP", pretrained="webli"), ["dog"])


def test_a_text_tower_that_is_not_here_can_be_brought(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(**config: object) -> None:
        raise RuntimeError("no transformers")

    monkeypatch.setattr(open_clip, "CustomTextCLIP", offline)
    with pytest.raises(StorageError, match=r"config of roberta-base \(no transf.*HF_HOME"):
        new_clip("roberta-ViT-B-32")


@pytest.mark.parametrize(
    ("model", "pretrained", "mean"),
    [
        ("RN50", "openai", open_clip.OPENAI_DATASET_MEAN),
        ("ViT-B-16-SigLIP", "webli", (0.5, 0.5, 0.5)),
        ("ViT-B-16-SigLIP", "a_file.pt", (0.5, 0.5, 0.5)),
        ("ViT-L-14", "laion2b_s32b_b82k", (0.5, 0.5, 0.5)),
        ("MobileCLIP-S1", "datacompdr", (0.0, 0.0, 0.0)),
        ("miniature-rn", "a_file.pt", open_clip.OPENAI_DATASET_MEAN),
    ],
)
def test_pixels_are_as_the_weights_saw_them(model: str, pretrained: str, mean: object) -> None:
    assert pixel_statistics(Teacher(model=model, pretrained=pretrained))[0] == mean


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


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        ("RN5O", r"did you mean 'RN50"),
        ("vit-b-32", r"did you mean 'ViT-B-32"),
        ("ViT-B/16-SigLIP", r"'ViT-B-16-SigLIP' or '.*' or '.*'\?"),
        ("zzzzzzzzzzzz", r"open_clip\.list_models\(\) lists them"),
    ],
)
def test_an_unknown_model_is_told_the_nearest(wrong: str, hint: str) -> None:
    with pytest.raises(RecipeError, match=f"{wrong}.*is no open_clip model; .*{hint}"):
        model_config(wrong)


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
    with pytest.raises(
        StorageError, match=r"no network.*teacher\.pretrained.*model to RN50-quickgelu"
    ):
        load_clip(Teacher(), None)
