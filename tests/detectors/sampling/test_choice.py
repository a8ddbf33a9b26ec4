"""Which way is taken, and that tracers see operators."""

import logging
from typing import Any

import pytest
import torch
from sampling_scenes import assert_near, draw
from torch import Tensor

from pipeline.detectors import sampling
from pipeline.detectors.attention import DeformableAttention, use_kernel
from pipeline.detectors.sampling import (
    choice,
    compiled,
    compiler,
    kernel_in_use,
    plain,
    portable,
    sample_and_sum,
)
from pipeline.recipe import DetectorSection

CPU = torch.device("cpu")


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the ways that were taken."""
    names: list[str] = []
    for module in (plain, portable, compiled):
        name, original = module.__name__.rsplit(".", 1)[1], module.sample_and_sum

        def noted(*args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Tensor:
            names.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(module, "sample_and_sum", noted)
    return names


def fastest() -> str:
    return "portable" if isinstance(compiler.load_kernel(), str) else "compiled"


def test_the_recipe_decides(taken: list[str]) -> None:
    scene = draw(16)
    for kernel, expected in (("auto", fastest()), ("portable", "portable")):
        sample_and_sum(scene.value, scene.shapes, scene.locations, scene.weights, kernel)
        assert taken.pop() == expected
    assert kernel_in_use(CPU, "portable").startswith("portable (the recipe")
    with pytest.raises(ValueError, match="kernel"):
        DetectorSection.model_validate({"kernel": "cuda"})


def test_what_the_kernel_cannot_do_is_portable(taken: list[str]) -> None:
    for scene in (draw(16, dtype=torch.float64), draw(compiled.MOST_DEPTH + 1, [(2, 2)])):
        sample_and_sum(scene.value, scene.shapes, scene.locations, scene.weights)
        assert taken.pop() == "portable"


def test_what_is_told_is_of_the_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    def problem(_: torch.device, dtype: torch.dtype) -> str | None:
        return "no bfloat16 here" if dtype == torch.bfloat16 else None

    monkeypatch.setattr(choice, "_triton_problem", problem)
    gpu = torch.device("cuda")
    assert kernel_in_use(gpu) == "Triton"
    assert kernel_in_use(gpu, dtype=torch.bfloat16) == "portable (no bfloat16 here)"
    assert kernel_in_use(CPU, dtype=torch.bfloat16) == kernel_in_use(CPU)
    assert "float64" in kernel_in_use(CPU, dtype=torch.float64)


@pytest.mark.parametrize("wrong", ["levels", "image", "weight"])
def test_sizes_that_do_not_fit_reach_no_kernel(wrong: str) -> None:
    value, shapes, locations, weights, _ = draw(16, [(3, 4), (1, 2)])
    if wrong == "levels":
        shapes = [(30, 40), (1, 2)]
    elif wrong == "image":
        value = value[:1]
    else:
        weights = weights[:, :-1]
    with pytest.raises(AssertionError, match="sizes differ"):
        sample_and_sum(value, shapes, locations, weights)


def test_a_detector_hands_the_recipe_down(make_detector: Any) -> None:
    for kernel in ("auto", "portable"):
        parts = [m for m in make_detector(kernel=kernel).modules() if hasattr(m, "kernel")]
        found = [part.kernel for part in parts if isinstance(part, DeformableAttention)]
        assert len(found) > 1 and set(found) == {kernel}


def test_the_log_has_one_line(caplog: pytest.LogCaptureFixture) -> None:
    scene = draw(16)
    choice._tell_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="pipeline"):
        for _ in range(3):
            sample_and_sum(scene.value, scene.shapes, scene.locations, scene.weights)
    assert [line.message for line in caplog.records] == [
        f"deformable attention on cpu: {kernel_in_use(CPU)}"
    ]


class Attention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = DeformableAttention(32, 2, 2, 3)
        torch.nn.init.normal_(self.attention.sampling_offsets.weight, std=0.1)

    def forward(self, query: Tensor, reference: Tensor, memory: Tensor) -> Tensor:
        mask = torch.zeros(memory.shape[:2], dtype=torch.bool)
        return self.attention(query, reference, memory, mask, [(3, 5), (2, 2)])


def inputs(last: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(1, 6, 32), torch.rand(1, 6, 2, last), torch.randn(1, 19, 32)


@pytest.mark.parametrize("last", [2, 4])
def test_export_and_trace_see_operators(taken: list[str], last: int) -> None:
    module, tensors = Attention().eval(), inputs(last)
    with torch.no_grad():
        expected = module(*tensors)
        assert taken.pop() == fastest()
        exported = torch.export.export(module, tensors)
        names = {str(node.target) for node in exported.graph.nodes}
        assert any("grid_sampler" in name for name in names)
        assert_near(exported.module()(*tensors), expected)
        traced = torch.jit.trace(module, tensors, check_trace=False)
        assert_near(traced(*tensors), expected)
    assert set(taken) <= {"plain"}


def test_compile_sees_operators_and_has_gradients() -> None:
    module, tensors = Attention(), inputs()
    results = []
    for run in (module, torch.compile(module, backend="aot_eager", fullgraph=True)):
        module.zero_grad()
        run(*tensors).square().sum().backward()
        results.append([parameter.grad.clone() for parameter in module.parameters()])
    for ours, theirs in zip(*results, strict=True):
        assert_near(ours, theirs)


def test_meta_tensors_have_shapes(caplog: pytest.LogCaptureFixture) -> None:
    with torch.device("meta"), caplog.at_level(logging.INFO, logger="pipeline"):
        output = Attention()(*inputs())
    assert output.shape == (1, 6, 32) and output.is_meta
    assert not caplog.records, "nothing is sampled, so there is no way to tell of"


def test_autocast_gives_its_dtype_and_close_numbers() -> None:
    module, tensors = Attention(), inputs()
    expected = module(*tensors)
    for kernel in ("auto", "portable"):
        use_kernel(module, kernel)
        with torch.autocast("cpu", torch.bfloat16):
            output = module(*tensors)
        assert output.dtype == torch.bfloat16
        # Several roundings to 8 bits.
        assert_near(output, expected, rtol=2**-5)


def test_triton_that_does_not_work_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here, because there is no GPU."""
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    assert kernel_in_use(torch.device("cuda")).startswith("portable (Triton does not work here: ")


def test_all_is_offered_in_one_place() -> None:
    assert set(sampling.__all__) >= {"sample_and_sum", "kernel_in_use", "KernelChoice"}
