"""The house plan, enforced: imports go one way, and third parties stay behind their fences."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "pipeline"

# A module may import from its own tier or from a lower one.
TIERS = [
    ["pipeline.errors", "pipeline.progress", "pipeline.signals"],
    [
        "pipeline.recipe",
        "pipeline.recipe_file",
        "pipeline.data.sample",
        "pipeline.data.batch",
        "pipeline.detectors.boxes",
    ],
    ["pipeline.data", "pipeline.detectors", "pipeline.semantics"],
    ["pipeline.training", "pipeline.evaluation", "pipeline.report", "pipeline.study"],
    ["pipeline.cluster"],
    [
        "pipeline.check",
        "pipeline.preparation",
        "pipeline.run",
        "pipeline.store_labels",
        "pipeline.studies",
    ],
    ["pipeline.arguments", "pipeline.cli", "pipeline.__main__"],
]

FENCES = {
    "deepspeed": ["pipeline.training"],
    "ray": ["pipeline.cluster"],
    "webdataset": ["pipeline.data", "pipeline.training.checkpoint"],
    "fsspec": ["pipeline.data", "pipeline.training.checkpoint"],
    "urllib3": ["pipeline.data.stream.web_ranges"],
    "open_clip": ["pipeline.semantics"],
    "timm": ["pipeline.detectors.backbone"],
    "lvis": ["pipeline.evaluation", "pipeline.data"],
    "onnx": ["pipeline.evaluation.onnx_export"],
    "onnxruntime": ["pipeline.evaluation.onnx_export"],
    "onnxscript": ["pipeline.evaluation.onnx_export"],
}

TORCH_FREE = [
    "pipeline",
    "pipeline.cli",
    "pipeline.recipe",
    "pipeline.data.sample",
    "pipeline.data.vocabulary.categories",
    "pipeline.data.images",
    "pipeline.data.sources",
    "pipeline.data.shards.preparing",
    "pipeline.data.plan.steps",
    "pipeline.data.plan.geometry",
    "pipeline.data.miniature.world",
    "pipeline.training.locate",
]


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """(line, imported module) of every import of a file, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            assert node.module
            yield node.lineno, node.module


def within(module: str, rooms: list[str]) -> bool:
    return any(module == room or module.startswith(room + ".") for room in rooms)


def tier_of(module: str) -> int:
    if module == "pipeline":
        return len(TIERS)  # It offers what is above; modules import its parts, never itself.
    exact = [i for i, rooms in enumerate(TIERS) if module in rooms]
    if exact:
        return exact[0]
    inside = [i for i, rooms in enumerate(TIERS) if within(module, rooms)]
    return inside[0] if inside else 0


MODULES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_go_one_way(path: Path) -> None:
    module = module_name(path)
    for line, imported in imports_of(path):
        if imported.split(".")[0] == "pipeline" and imported != "pipeline":
            assert tier_of(imported) <= tier_of(module), (
                f"{path.name}:{line}: {module} (tier {tier_of(module)}) imports {imported} "
                f"(tier {tier_of(imported)}), which is above it"
            )


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_third_parties_stay_behind_their_fences(path: Path) -> None:
    module = module_name(path)
    for line, imported in imports_of(path):
        rooms = FENCES.get(imported.split(".")[0])
        assert rooms is None or within(module, rooms), (
            f"{path.name}:{line}: {imported} may be imported only in {', '.join(rooms)}"
        )


@pytest.mark.parametrize("module", TORCH_FREE)
def test_light_modules_do_not_import_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0, (
        f"importing {module} imports torch or ray"
    )
