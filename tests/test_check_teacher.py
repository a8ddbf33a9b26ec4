"""What `longtail check` says of a teacher, and refuses of it, before anything is spent."""

from pathlib import Path

import numpy as np
import pytest
from tiny_world import tiny_recipe

from pipeline.check import check_stages
from pipeline.data.miniature.world import draw_world
from pipeline.errors import RecipeError
from pipeline.semantics import text


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
