"""The command line as a user meets it: quick help, one-paragraph errors, exit codes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "tests" / "recipes"


def longtail(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *map(str, arguments)],
        cwd=cwd,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def assert_refused(result: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, "an error is one paragraph"
    for word in words:
        assert word in result.stderr


def test_a_reader_that_has_gone_is_no_fault() -> None:
    script = """
from pipeline import cli
def verb(arguments):
    for _ in range(10_000):
        print("a line of what the verb says")
cli.VERBS["show"] = verb
cli.main(["show", "recipe.yaml"])
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b"longtail show: a pipe was closed at its other end\n"
    assert process.wait(60) == 141
    process.stderr.close()


def test_help_names_every_verb_and_imports_nothing_heavy(tmp_path: Path) -> None:
    result = longtail("--help", cwd=tmp_path)
    assert result.returncode == 0
    for verb in (
        "run",
        "prepare",
        "train",
        "evaluate",
        "report",
        "check",
        "show",
        "export",
        "import-checkpoint",
        "predict",
    ):
        assert f"  {verb} " in result.stdout.replace("\n", " ")
    code = (
        "import sys; from pipeline.cli import build_parser; build_parser().format_help(); "
        "sys.exit(bool({'torch', 'ray', 'pydantic', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_show_prints_the_resolved_recipe(tmp_path: Path) -> None:
    result = longtail("show", RECIPES / "tiny.yaml", "training.steps=77", cwd=tmp_path)
    assert result.returncode == 0
    assert "steps: 77" in result.stdout
    assert "focal_alpha: 0.25" in result.stdout, "defaults are shown too"


EVALUATE_FILES = ["evaluate", "--annotations", "gt.json", "--detections", "dt.json"]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["check", "missing.yaml"], 78, "does not exist"),
        (["check", RECIPES / "tiny.yaml", "training.stepz=1"], 78, "did you mean 'steps'"),
        (["check", "training.steps=1"], 78, "no recipe given"),
        (["check", f"data.train=[{'x' * 400}]"], 78, "no recipe given"),
        (["check", RECIPES / "tiny.yaml", RECIPES / "tiny.yaml"], 78, "two recipes have the name"),
        (["check", RECIPES / "tiny.yaml"], 78, "no checkpoint in"),
        (
            ["check", RECIPES / "tiny_pretrain.yaml", "data.miniature=null", "data.root=nowhere"],
            78,
            "set data.root to the folder that holds the raw data sets",
        ),
        (
            ["check", RECIPES / "tiny_pretrain.yaml", "teacher.model=RN51"],
            78,
            "did you mean 'RN50'",
        ),
        (
            ["check", RECIPES / "tiny_pretrain.yaml", "cluster.gpus_per_worker=1"],
            78,
            "cluster.gpus_per_worker",
        ),
        (["evaluate", "--annotations", "a.json"], 78, "both --annotations and --detections"),
        (
            ["evaluate", RECIPES / "tiny.yaml", "--score-threshold", "0"],
            78,
            "--score-threshold belong to --annotations",
        ),
        (
            [*EVALUATE_FILES, "--json", "nowhere/out.json"],
            78,
            "there is no folder nowhere",
        ),
        ([*EVALUATE_FILES, "--json", "."], 78, "is a directory; name a file"),
        (["export", RECIPES / "tiny.yaml", "-o", "out"], 74, "no checkpoint in"),
        (["export", "nowhere", "-o", "out"], 78, "give an exported folder"),
        (["export", "nowhere", "-o", "out", "--size", "64x64"], 78, "--size belongs to --onnx"),
        (["export", "a", "seed=1", "b", "-o", "out"], 78, "export takes one checkpoint, not 2"),
        (["predict", "nowhere", "seed=1", "a.jpg"], 78, "overrides belong to a recipe"),
        (["predict", "nowhere", "seed=1"], 78, "no image given"),
        (["check", RECIPES / "tiny.yaml", "training.step-s=1"], 78, "did you mean 'steps'"),
        (["predict", RECIPES / "tiny.yaml", "output=here", "a.jpg"], 74, "checkpoint in here/tiny"),
        (["report", RECIPES / "tiny.yaml"], 65, "runs/tiny"),
    ],
)
def test_what_cannot_work_is_refused_in_one_paragraph(
    tmp_path: Path, words: list[object], code: int, message: str
) -> None:
    import torch

    if "cluster.gpus_per_worker=1" in words and torch.cuda.is_available():
        pytest.skip("this machine has a GPU, so the recipe is right")
    assert_refused(longtail(*words, cwd=tmp_path), code, message)
    assert not list(tmp_path.iterdir()), "a refusal writes nothing"


def test_a_path_that_exists_is_no_override(tmp_path: Path) -> None:
    path = tmp_path / "lr=1e-4" / "r.yaml"
    path.parent.mkdir()
    path.write_text((RECIPES / "tiny.yaml").read_text())
    shown = longtail("show", "lr=1e-4/r.yaml", "seed=5", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "# tiny: hash" in shown.stdout and "seed: 5" in shown.stdout
    exported = longtail("export", "lr=1e-4/r.yaml", "output=here", "-o", "out", cwd=tmp_path)
    assert_refused(exported, 74, "no checkpoint in here/tiny")


def test_check_refuses_a_start_from_another_detector(tmp_path: Path) -> None:
    both = (RECIPES / "tiny_pretrain.yaml", RECIPES / "tiny.yaml")
    fine = longtail("check", *both, cwd=tmp_path)
    assert fine.returncode == 0, fine.stderr
    assert "batch       4 images = 2 workers x 2" in fine.stdout
    other = tmp_path / "tiny.yaml"
    other.write_text(both[1].read_text().replace("hidden_dim: 32", "hidden_dim: 64"))
    assert_refused(longtail("check", both[0], other, cwd=tmp_path), 78, "detector.hidden_dim")


def test_evaluate_files_anywhere(tmp_path: Path) -> None:
    truth = {
        "images": [
            {
                "id": 1,
                "width": 100,
                "height": 100,
                "neg_category_ids": [],
                "not_exhaustive_category_ids": [],
            }
        ],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 10, 30, 30], "area": 900}
        ],
        "categories": [{"id": 1, "name": "cup", "frequency": "r", "image_count": 1}],
    }
    found = [{"image_id": 1, "category_id": 1, "bbox": [10, 10, 30, 30], "score": 0.9}]
    (tmp_path / "gt.json").write_text(json.dumps(truth))
    (tmp_path / "dt.json").write_text(json.dumps(found))
    result = longtail(
        *("evaluate", "--annotations", "gt.json", "--detections", "dt.json"),
        *("--official", "--json", "out.json"),
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["AP"] == figures["APr"] == pytest.approx(1.0)
    assert figures["APc"] is None
    assert "official" in result.stdout
    found[0]["category_id"] = 7
    (tmp_path / "dt.json").write_text(json.dumps(found))
    refused = longtail(
        "evaluate", "--annotations", "gt.json", "--detections", "dt.json", cwd=tmp_path
    )
    assert_refused(refused, 65, "7")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("detector.backbone.name=resnet81", "resnet81"),
        ("detector.backbone.weights=nowhere.safetensors", "is no file"),
        ("data.validation.format=imagenet21k", "a run evaluates on lvis, objects365, coco"),
    ],
)
def test_check_finds_what_would_fail_in_a_worker(
    tmp_path: Path, override: str, message: str
) -> None:
    recipes = [RECIPES / "tiny_pretrain.yaml", RECIPES / "tiny.yaml"]
    if "validation" not in override:
        recipes = recipes[:1]
        refused = longtail("check", *recipes, override, cwd=tmp_path)
    else:
        text = (
            recipes[1]
            .read_text()
            .replace("lvis_val, format: lvis", "lvis_val, format: imagenet21k")
        )
        (tmp_path / "tiny.yaml").write_text(text)
        refused = longtail("check", recipes[0], tmp_path / "tiny.yaml", cwd=tmp_path)
    assert_refused(refused, 78, message)
