"""`longtail prepare` as a user meets it: one data set, killed and run again, two at once."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.arguments import build_parser
from pipeline.cli import prepare as prepare_verb
from pipeline.errors import RecipeError

ROOT = Path(__file__).resolve().parents[1]
NUM_IMAGES = 300
PER_SHARD = 10


def write_world(root: Path, num_images: int = NUM_IMAGES) -> None:
    """Photographs of noise, large enough that a shard takes a moment."""
    rng = np.random.default_rng(0)
    images = [
        {
            "id": k,
            "width": 400,
            "height": 300,
            "coco_url": f"http://images.cocodataset.org/train2017/{k:012d}.jpg",
            "neg_category_ids": [],
            "not_exhaustive_category_ids": [],
        }
        for k in range(1, num_images + 1)
    ]
    boxes = [
        {"id": k, "image_id": k, "category_id": 1, "bbox": [10, 20, 380 + k % 30, 50]}
        for k in range(1, num_images + 1)
    ]
    category = {"id": 1, "name": "noise", "synset": "noise.n.01", "frequency": "f"}
    tree = {"categories": [category], "images": images, "annotations": boxes}
    (root / "images").mkdir(parents=True)
    (root / "lvis.json").write_text(json.dumps(tree))
    pixels = rng.integers(0, 256, (300, 400, 3), dtype=np.uint8)
    for image in images:
        buffer = BytesIO()
        Image.fromarray(np.roll(pixels, int(image["id"]), axis=0)).save(buffer, "JPEG")
        (root / "images" / f"{image['id']:012d}.jpg").write_bytes(buffer.getvalue())


def command(root: Path, *words: str) -> list[str]:
    options = ["--format", "lvis", "--images", "images", "--annotations", "lvis.json"]
    options += ["--root", str(root), "--name", "noise", f"data.samples_per_shard={PER_SHARD}"]
    return [sys.executable, "-m", "pipeline", "prepare", *options, *words]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def prepare(root: Path, cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(root, *words),
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def wait_for_quiet(folder: Path) -> None:
    """Tasks that were under way end within seconds of their driver."""
    before: list[str] = []
    while (now := sorted(os.listdir(folder))) != before:
        before = now
        time.sleep(3)


@pytest.mark.slow
def test_a_killed_job_does_only_what_is_left(tmp_path: Path) -> None:
    write_world(tmp_path / "raw")
    folder = tmp_path / "shards" / "noise"
    process = subprocess.Popen(
        command(tmp_path / "raw"),
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while len(list(folder.glob("*.json"))) < 5:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)
    second = prepare(tmp_path / "raw", tmp_path)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    wait_for_quiet(folder)
    assert second.returncode == 74, second.stdout + second.stderr
    assert f"is being prepared by process {process.pid} on" in second.stderr
    finished = {path: path.stat().st_mtime_ns for path in folder.glob("*.json")}
    shards = {p.with_suffix(".tar"): p.with_suffix(".tar").stat().st_mtime_ns for p in finished}
    assert 5 <= len(finished) < NUM_IMAGES // PER_SHARD, "it was killed in the middle"
    assert not (folder / "index.json").exists()

    again = prepare(tmp_path / "raw", tmp_path)
    assert again.returncode == 0, again.stderr
    assert "shards of noise: 300 images, 300 boxes, 30 shards" in again.stdout
    # One box in three reaches over the edge of its image.
    assert "clipped" in again.stdout
    for path, changed in (finished | shards).items():
        assert path.stat().st_mtime_ns == changed, f"{path.name} was written again"
    assert not list(folder.glob(".*")), "neither a lock nor half a shard is left"

    fresh = prepare(tmp_path / "raw", tmp_path, "--shards", str(tmp_path / "fresh"))
    assert fresh.returncode == 0, fresh.stderr
    for path in sorted(folder.iterdir()):
        assert path.read_bytes() == (tmp_path / "fresh" / "noise" / path.name).read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "lvsi", "--images", "i"], "source.format: input should be 'lvis'"),
        (["--format", "lvis"], "source.images is missing"),
        (["--format", "lvis", "--images", "i"], "format lvis needs `annotations`"),
        (["--format", "lvis", "use_lables=false"], "did you mean 'use_labels'"),
        (["--format", "lvis", "data.samples_per_shart=3"], "did you mean 'samples_per_shard'"),
        (["--format", "lvis", "a.yaml"], "either recipes or --format, not both"),
        (["--images", "i", "--shards", "s"], "--images, --shards belong to --format"),
        (
            ["--format", "lvis", "--images", "i", "--annotations", "a", "--shards", "no://x"],
            "no://x/lvis: no file system for this URL",
        ),
        ([], "no recipe given"),
    ],
)
def test_a_data_set_that_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=re.escape(message)) as caught:
        prepare_verb(build_parser().parse_args(["prepare", *words]))
    assert caught.value.exit_code == 78 and "\n" not in str(caught.value)


@pytest.mark.slow
def test_what_was_left_out_is_told(tmp_path: Path) -> None:
    write_world(tmp_path / "raw", 12)
    (tmp_path / "raw/images/000000000003.jpg").write_bytes(b"<html>")
    done = prepare(tmp_path / "raw", tmp_path, "data.store_short_side=100")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    place = next(k for k, line in enumerate(lines) if line.startswith("shards of noise: 11 images"))
    table = "\n".join(lines[place:])
    assert "1  unreadable images left out" in table and "of a known format" in table
    assert "11  images scaled down" in table
    assert "images/s" in done.stdout and "MB/s" in done.stdout
    report = json.loads((tmp_path / "shards/noise/index.json").read_text())["report"]
    assert len(report["unreadable"]) == 1 and report["scaled"]["images"] == 11
