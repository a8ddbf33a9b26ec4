"""The benchmark of the plan runs, and says what it measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "plan.py"


def run(*arguments: str) -> str:
    command = [sys.executable, SCRIPT, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_larger_window_mixes_more_and_holds_more() -> None:
    rows = [line.split() for line in run("mixing", "--shards", "100").splitlines()[2:]]
    assert [row[0] for row in rows] == ["1", "4", "16", "64", "100", "perfect"]
    assert [row[1] for row in rows] == ["1", "4", "16", "64", "100", "all"]
    shards, effective = ([float(row[k]) for row in rows] for k in (3, 4))
    assert (
        shards[0] < 1.1 and 3.5 < shards[1] < 4.1 and shards[-2] == pytest.approx(shards[-1], 0.1)
    )
    assert effective[0] < effective[1] < effective[2] < effective[3]
    assert effective[-2] == pytest.approx(effective[-1], rel=0.3)


def test_like_shapes_pad_less(tmp_path: Path) -> None:
    table = "image_id,image_w,image_h\n" + "a,640,480\nb,480,640\nc,600,600\n" * 40
    (tmp_path / "sizes.csv").write_text(table)
    images = [{"width": 640, "height": 427}] * 30
    (tmp_path / "more.json").write_text(json.dumps({"images": images}))
    text = run(
        "padding",
        *("--sizes", str(tmp_path / "sizes.csv"), "--sizes", str(tmp_path / "more.json")),
        *("--ranks", "2", "--batch-size", "16", "--steps", "5"),
    )
    assert text.startswith("150 images of sizes.csv, more.json; 5 steps of 16, 2 ranks")
    rows = [line.split() for line in text.splitlines()[2:]]
    assert len(rows) == 12
    for plain, grouped in zip(rows[::2], rows[1::2], strict=True):
        assert (plain[1], grouped[1]) == ("no", "yes")
        assert float(grouped[3].rstrip("%")) < float(plain[3].rstrip("%"))


@pytest.mark.slow
def test_scale_can_be_tried_small() -> None:
    text = run("scale", "--divide", "200")
    for name in ("longtail, uniform", "longtail, repeat_factor", "longtail, class_aware"):
        assert name in text
    assert text.count("first slot of imagenet21k") == 3 and "number of categories" in text
