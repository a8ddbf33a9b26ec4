"""`benchmarks/fps.py` measures what it says, and tells what was wrong with its command line."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from tiny_checkpoint import save_checkpoint
from tiny_world import ROOT

from pipeline.evaluation.predict import evaluation_batch, load_detector


@pytest.fixture
def fps() -> ModuleType:
    spec = spec_from_file_location("fps", ROOT / "benchmarks" / "fps.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(fps: ModuleType, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["fps.py", *words])
    code: int = fps.main()
    return code


def test_what_is_measured_is_said(
    fps: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [str(save_checkpoint(tmp_path)), "--size", "64x90", "--batch", "2", "--device", "cpu"]
    assert run(fps, monkeypatch, *words, "--repeats", "1", "--warm-up", "0") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[1:]] == ["model alone", "end to end"]
    assert "for 2 of 64x90 padded to 64x96, median of 1)" in lines[1]


def test_the_model_alone_gets_what_the_evaluation_gives_it(fps: ModuleType, tmp_path: Path) -> None:
    loaded = load_detector(save_checkpoint(tmp_path))
    batch = fps.random_images(loaded, (64, 90), 1)
    theirs = evaluation_batch(Image.new("RGB", (90, 64)), loaded.recipe.data.transforms, 0)
    assert theirs.mask.any(), "there is padding"
    assert torch.equal(batch.mask, theirs.mask) and batch.images.shape == theirs.images.shape


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["nowhere"], 78, "fps: checkpoint nowhere does not exist; give an exported folder"),
        (["nowhere", "--size", "3"], 78, "must be HEIGHTxWIDTH of at least 32"),
        (["nowhere", "--repeats", "0"], 2, "--repeats: '0' must be an integer of 1 or more"),
        (["nowhere", "--batch", "-2"], 2, "--batch: '-2' must be an integer of 1 or more"),
        (["nowhere", "--warm-up", "x"], 2, "--warm-up: 'x' must be an integer of 0 or more"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    fps: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    code: int,
    message: str,
) -> None:
    try:
        given: object = run(fps, monkeypatch, *words)
    except SystemExit as stopped:  # argparse's own
        given = stopped.code
    told = capsys.readouterr().err
    assert given == code and message in told
    assert code == 2 or len(told.splitlines()) == 1, "an error is one paragraph"
