"""Text embeddings from files: real ones, and every way in which a file can be wrong."""

import csv
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file

from pipeline.data.vocabulary.categories import clean_name
from pipeline.errors import RecipeError
from pipeline.recipe import Teacher
from pipeline.semantics import text
from pipeline.semantics.ready_made import read_text_embeddings
from pipeline.semantics.text import check_text, text_embeddings

NAMES = ["ring", "bow", "dog"]


def section(path: Path, model: str = "miniature-rn") -> Teacher:
    return Teacher(model=model, pretrained="w.pt", text_embeddings=str(path))


def values(number: int = 3, width: int = 64) -> NDArray[np.float16]:
    return np.random.default_rng(0).normal(0, 3, (number, width)).astype(np.float16)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_rows_are_the_files_made_units(tmp_path: Path, suffix: str, transposed: bool) -> None:
    path, given = tmp_path / f"text{suffix}", values()
    stored = np.ascontiguousarray(given.T) if transposed else given
    if suffix == ".npy":
        np.save(path, stored)
    else:
        save_file({"text_embeddings": stored}, path)
    rows = read_text_embeddings(section(path), NAMES)
    expected = given.astype(np.float64)
    expected /= np.sqrt((expected**2).sum(axis=1, keepdims=True))
    assert rows.dtype == torch.float32 and rows.shape == (3, 64)
    np.testing.assert_allclose(rows.numpy(), expected, atol=1e-6)


def test_as_many_categories_as_numbers_are_rows(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", values(64))
    rows = read_text_embeddings(section(tmp_path / "t.npy"), [str(i) for i in range(64)])
    assert torch.equal(rows, torch.nn.functional.normalize(torch.from_numpy(values(64)).float()))


def test_neither_weights_nor_a_tokenizer_are_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "text_tokenizer", lambda *_: pytest.fail("a tokenizer"))
    monkeypatch.setattr(text, "load_clip", lambda *_: pytest.fail("weights"))
    np.save(tmp_path / "t.npy", values(3, 768))
    given = section(tmp_path / "t.npy", "ViT-B-16-SigLIP")
    check_text(given, NAMES)
    assert text_embeddings(given, NAMES, None, tmp_path / "cache").shape == (3, 768)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (values(3, 512), r"3 x 512.*'miniature-rn' are 64 wide.*name the model"),
        (values(4, 64), r"4 x 64.*vocabulary has 3 categories.*order of their ids"),
        (values(64, 4), r"64 x 4.*vocabulary has 3 categories"),
        (values()[0], r"\(64,\) of float16.*vector.*for each category"),
        (np.ones((3, 64), np.int64), r"\(3, 64\) of int64"),
        (values() * np.array([[1], [0], [1]], np.float16), r"row 1, of category 'bow', is zero"),
        (values() * np.array([[1], [1], [np.nan]], np.float16), r"row 2, of category 'dog'"),
        (np.array([{"a": 1}], object), r"without running code"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, given: NDArray, reason: str) -> None:
    np.save(tmp_path / "t.npy", given, allow_pickle=True)
    with pytest.raises(RecipeError, match=rf"t\.npy.*{reason}"):
        check_text(section(tmp_path / "t.npy"), NAMES)


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (eval, ("open('executed', 'w')",))


def test_files_of_another_kind_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.npy").write_bytes(pickle.dumps(_Evil()))
    (tmp_path / "short.npy").write_bytes(b"\x93NUMPY\x01\x00")
    (tmp_path / "empty.npy").write_bytes(b"")
    (tmp_path / "wrong.safetensors").write_bytes(b"1234567890")
    save_file({"embeddings": values()}, tmp_path / "key.safetensors")
    (tmp_path / "t.pt").write_bytes(b"")
    for name, reason in [
        ("evil.npy", "without running code"),
        ("short.npy", "cannot be read"),
        ("empty.npy", "cannot be read"),
        ("wrong.safetensors", "cannot be read"),
        ("key.safetensors", "the key text_embeddings"),
        ("t.pt", r"must be \.npy, or \.safetensors"),
        ("absent.npy", "is no file"),
    ]:
        with pytest.raises(RecipeError, match=rf"{name}.*{reason}"):
            read_text_embeddings(section(tmp_path / name), NAMES)
    assert not (tmp_path / "executed").exists()


def test_real_embeddings_have_sensible_neighbours(shared_data: Path) -> None:
    """Detic's, of CLIP ViT-B/32: not of unit length, one row for each LVIS category."""
    folder = shared_data / "detic_metadata"
    categories = json.loads((folder / "lvis_v1_train_cat_info.json").read_text())
    names = [category["name"] for category in sorted(categories, key=lambda entry: entry["id"])]
    rows = read_text_embeddings(section(folder / "lvis_v1_clip_a+cname.npy", "ViT-B-32"), names)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(1203))
    likeness = (rows @ rows.T).fill_diagonal_(-1)
    nearest = {
        "dog": "puppy", "truck": "trailer_truck", "sofa": "sofa_bed", "airplane": "jet_plane",
        "cow": "bull", "violin": "guitar", "orange_(fruit)": "mandarin_orange",
        "coffee_maker": "coffeepot",
    }  # fmt: skip
    for name, expected in nearest.items():
        assert names[int(likeness[names.index(name)].argmax())] == expected
    with pytest.raises(RecipeError, match=r"1203 x 512.*'RN50' are 1024 wide"):
        read_text_embeddings(section(folder / "lvis_v1_clip_a+cname.npy", "RN50"), names)


def test_real_embeddings_of_two_data_sets_agree_on_equal_names(shared_data: Path) -> None:
    """365 names of Objects365 among 1203 of LVIS: the 177 that both have find each other."""
    folder = shared_data / "detic_metadata"
    categories = json.loads((folder / "lvis_v1_train_cat_info.json").read_text())
    lvis = [category["name"] for category in sorted(categories, key=lambda entry: entry["id"])]
    with (folder / "Objects365_names_fix.csv").open(encoding="utf-8") as file:
        objects = [row[2] for row in csv.reader(file)]
    theirs = read_text_embeddings(section(folder / "o365_clip_a+cnamefix.npy", "ViT-B-32"), objects)
    ours = read_text_embeddings(section(folder / "lvis_v1_clip_a+cname.npy", "ViT-B-32"), lvis)
    plain = [clean_name(name).lower() for name in lvis]
    found = (theirs @ ours.T).argmax(dim=1).tolist()
    both = [i for i, name in enumerate(objects) if name.strip().lower() in plain]
    assert len(both) == 177
    for i in both:
        assert plain[found[i]] == objects[i].strip().lower()
