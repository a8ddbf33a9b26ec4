"""What `longtail check` says of a teacher, and refuses of it, before anything is spent."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_world import run_command, tiny_recipe, write_recipe

from pipeline.check import check_stages
from pipeline.data.miniature.world import draw_world
from pipeline.errors import RecipeError
from pipeline.semantics import text
from pipeline.semantics.clip import new_clip


@pytest.fixture(scope="module")
def folder(module_path: Path) -> Path:
    draw_world(module_path / "raw", "tiny", 0)
    return module_path


def test_it_says_how_regions_will_be_read(folder: Path) -> None:
    told = check_stages([tiny_recipe(folder, "tiny")])
    assert "  teacher     miniature-rn, regions dense, chosen for this tower: RoIAlign on" in told
    crops = check_stages([tiny_recipe(folder, "tiny", teacher={"regions": "crops"})])
    assert "regions crops: each box cut out and resized to 64 x 64" in crops
    assert "  teacher  " not in check_stages([tiny_recipe(folder, "tiny", semantic=None)])


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({"model": "miniature-rm"}, r"no open_clip model; did you mean 'miniature-rn'"),
        ({"regions": "crops", "image_scale": 2.0}, r"image_scale is 2.*no effect"),
        ({"text_embeddings": "absent.npy"}, r"absent\.npy is no file"),
        ({"text_embeddings": "wide.npy"}, r"wide\.npy is 3 x 512.*64 wide"),
        ({"text_embeddings": "few.npy"}, r"few\.npy is 3 x 64.*the vocabulary has \d+ categories"),
    ],
)
def test_what_cannot_work_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, teacher: dict[str, object], message: str
) -> None:
    monkeypatch.chdir(folder)
    np.save("wide.npy", np.ones((3, 512), np.float32))
    np.save("few.npy", np.ones((3, 64), np.float32))
    with pytest.raises(RecipeError, match=message):
        check_stages([tiny_recipe(folder, "tiny", teacher=teacher)])


def test_a_name_that_is_too_long_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "templates", lambda _: ["{}" + " of the kind" * 10])
    with pytest.raises(RecipeError, match=r"category name '\w+' is \d+ tokens.* reads 32"):
        check_stages([tiny_recipe(folder, "tiny")])


def write_weights(folder: Path) -> None:
    """Of miniature-rn: `whole`, without a tensor that it has (`short`), and with one of another
    shape (`wide`), each in both kinds of file; and a file of no weights at all."""
    whole = new_clip("miniature-rn").state_dict()
    short = {key: tensor for key, tensor in whole.items() if key != "text_projection"}
    wide = whole | {"text_projection": torch.zeros(64, 512)}
    for name, state in (("whole", whole), ("short", short), ("wide", wide)):
        save_file(state, folder / f"{name}.safetensors")
        torch.save({"state_dict": state}, folder / f"{name}.pt")
    (folder / "cut.safetensors").write_bytes((folder / "whole.safetensors").read_bytes()[:-9])
    (folder / "notes.pt").write_text("not weights")


@pytest.mark.parametrize(
    ("pretrained", "message"),
    [
        ("absent.pt", r"'absent\.pt' is neither a file nor an open_clip tag of miniature-rn"),
        ("opanai", r"'opanai' is neither a file nor an open_clip tag"),
        ("short.safetensors", r"short\.safetensors does not hold weights.*text_projection"),
        ("short.pt", r"short\.pt does not hold weights.*text_projection"),
        ("wide.safetensors", r"wide\.safetensors does not hold.*'miniature-rn'.*size mismatch"),
        ("wide.pt", r"wide\.pt does not hold weights of teacher\.model 'miniature-rn'.*512"),
        ("cut.safetensors", r"cut\.safetensors does not hold weights"),
        (
            "notes.pt",
            r"notes\.pt does not hold weights.*give a state dict as \.safetensors or \.pt",
        ),
    ],
)
@pytest.mark.filterwarnings("error:for :UserWarning")
def test_weights_that_do_not_fit_are_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pretrained: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_weights(tmp_path)
    for good in ("whole.safetensors", "whole.pt"):
        teacher = {"train": None, "pretrained": good}
        assert "miniature-rn" in check_stages([tiny_recipe(folder, "tiny", teacher=teacher)])
    with pytest.raises(RecipeError, match=message):
        teacher = {"train": None, "pretrained": pretrained}
        check_stages([tiny_recipe(folder, "tiny", teacher=teacher)])


@pytest.mark.slow
def test_commands_end_before_anything_is_prepared_or_ray_is_started(
    folder: Path, tmp_path: Path
) -> None:
    write_weights(tmp_path)
    teacher = {"train": None, "pretrained": str(tmp_path / "wide.pt")}
    recipe = tiny_recipe(folder, "unfit", teacher=teacher, output=str(tmp_path / "runs"))
    path = write_recipe(tmp_path, recipe)
    for verb in ("check", "train"):
        found = run_command("-m", "pipeline", verb, str(path), seconds=600)
        assert found.returncode == 78, found.stderr
        # One line: Ray would have told that it starts.
        assert len(found.stderr.strip().splitlines()) == 1 and "wide.pt" in found.stderr
        assert not (tmp_path / "runs").exists() and not (folder / "raw" / "shards").exists()
