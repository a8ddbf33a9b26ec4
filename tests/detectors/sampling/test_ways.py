"""Every way to sample gives the same sums and gradients as the definition by loops."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from sampling_scenes import Sample, assert_close, assert_near, draw, halved, loops, run

from pipeline.detectors.sampling import compiled, plain, portable, sample_and_sum
from pipeline.detectors.sampling.compiler import Kernel, load_kernel

WAYS = ["plain", "portable", "compiled"]


def way(name: str) -> Sample:
    if name != "compiled":
        return {"plain": plain, "portable": portable}[name].sample_and_sum
    kernel = load_kernel()
    if not isinstance(kernel, Kernel):
        pytest.skip(f"no kernel was compiled: {kernel}")
    return partial(compiled.sample_and_sum, kernel=kernel)


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("depth", [3, 8, 16, 32, 36, 64])
def test_equals_loops(name: str, depth: int) -> None:
    scene = draw(depth)
    assert_close(run(way(name), scene), loops(scene))


@pytest.mark.parametrize("name", WAYS)
def test_many_points_and_one_query(name: str) -> None:
    """More points than are found at once, and five levels."""
    shapes = [(6, 5), (4, 1), (1, 4), (2, 3), (3, 2)]
    scene = draw(16, shapes, batch=3, queries=1, heads=1, points=19)
    assert_close(run(way(name), scene), loops(scene))


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize(("batch", "queries"), [(0, 9), (2, 0)])
def test_nothing_to_sample(name: str, batch: int, queries: int) -> None:
    found = run(way(name), draw(16, batch=batch, queries=queries))
    assert all(tensor.isfinite().all() and not tensor.any() for tensor in found)


def test_portable_gradients_equal_finite_differences() -> None:
    scene = draw(2, [(3, 4), (2, 1)], queries=3, heads=2, dtype=torch.float64)
    locations = torch.rand_like(scene.locations) * 1.4 - 0.2
    tensors = [x.requires_grad_() for x in (scene.value, locations, scene.weights)]
    assert torch.autograd.gradcheck(
        lambda value, locations, weights: portable.sample_and_sum(
            value, scene.shapes, locations, weights
        ),
        tensors,
    )


@pytest.mark.parametrize("name", WAYS)
def test_only_wanted_gradients_are_computed(name: str) -> None:
    scene = draw(16)
    expected = run(way(name), scene)[1:]
    for wanted in range(3):
        tensors = [scene.value, scene.locations, scene.weights]
        tensors[wanted] = tensors[wanted].clone().requires_grad_()
        output = way(name)(tensors[0], scene.shapes, tensors[1], tensors[2])
        output.backward(scene.gradient)
        torch.testing.assert_close(tensors[wanted].grad, expected[wanted], atol=1e-5, rtol=1e-5)
        assert [x.grad is None for x in tensors].count(False) == 1


@pytest.mark.parametrize("name", WAYS)
def test_a_location_that_is_no_number_is_seen_in_the_output(name: str) -> None:
    scene = draw(16)
    scene.locations[1, 4, 2, 1, 1, 0] = torch.nan
    output = way(name)(scene.value, scene.shapes, scene.locations, scene.weights)
    spoiled = output.isnan().unflatten(2, (3, 16))
    assert spoiled[1, 4, 2].all() and spoiled.sum() == 16


@pytest.mark.parametrize("name", ["portable", "compiled"])
def test_memory_that_is_not_contiguous(name: str) -> None:
    scene = draw(16)
    turned = [
        x.transpose(0, 1).contiguous().transpose(0, 1)
        for x in (scene.value, scene.locations, scene.weights)
    ]
    again = scene._replace(value=turned[0], locations=turned[1], weights=turned[2])
    gradient = scene.gradient.transpose(0, 1).contiguous().transpose(0, 1)
    assert_close(run(way(name), again._replace(gradient=gradient)), loops(scene))


def test_compiled_has_the_same_bits_whatever_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "LEAST_WORK", 1)
    before = torch.get_num_threads()
    scene = draw(32, [(9, 13), (5, 6), (3, 3)], queries=301, heads=5, points=4)
    found = {}
    try:
        for threads in (1, 2, 3, 7, 64):
            torch.set_num_threads(threads)
            found[threads] = [run(way("compiled"), scene) for _ in range(2)]
    finally:
        torch.set_num_threads(before)
    first = found[1][0]
    for runs in found.values():
        for result in runs:
            assert all(torch.equal(a, b) for a, b in zip(first, result, strict=True))


def test_half_precision_is_summed_in_single() -> None:
    scene = draw(16)
    half = halved(scene)
    expected = loops(half)
    for kernel in ("auto", "portable"):
        found = run(partial(sample_and_sum, kernel=kernel), half)
        assert [x.dtype for x in found] == [torch.bfloat16] * 2 + [torch.float32] * 2
        # The result is rounded to 8 bits; a sum in bfloat16 would be several times as far off.
        for ours, theirs, rtol in zip(found, expected, [2**-8, 2**-8, 2e-5, 2e-5], strict=True):
            assert_near(ours, theirs, rtol)


TRITON = """
import sys
sys.path.insert(0, sys.argv[1])
from sampling_scenes import assert_close, assert_near, draw, halved, loops, run
from pipeline.detectors.sampling import triton_kernel
import torch
sample = triton_kernel.sample_and_sum
for depth, shapes, heads, points, queries in (
    (16, [(5, 7), (3, 4), (1, 1)], 3, 2, 50),
    (32, [(9, 6), (1, 5)], 2, 4, 7),
    (24, [(4, 3)], 1, 1, 90),
):
    scene = draw(depth, shapes, queries=queries, heads=heads, points=points)
    expected = loops(scene)
    assert_close(run(sample, scene), expected)
    for wanted in range(3):
        tensors = [scene.value, scene.locations, scene.weights]
        tensors[wanted] = tensors[wanted].clone().requires_grad_()
        sample(tensors[0], scene.shapes, *tensors[1:]).backward(scene.gradient)
        assert_near(tensors[wanted].grad, expected[1 + wanted])
    half = halved(scene)
    expected = loops(half)
    found = run(sample, half)
    assert found[0].dtype == found[1].dtype == torch.bfloat16
    # The interpreter cuts digits off where a GPU rounds.
    for ours, theirs, rtol in zip(found, expected, [2**-7, 2**-8, 2e-5, 2e-5]):
        assert_near(ours, theirs, rtol)
scene.locations[0, 8, 0, 0, 0, 1] = torch.nan
output = sample(scene.value, scene.shapes, scene.locations, scene.weights)
assert output[0, 8].isnan().all() and output.isnan().sum() == depth
"""


@pytest.mark.slow
def test_triton_in_its_interpreter_equals_loops(clean_environment: dict[str, str]) -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", TRITON, str(Path(__file__).parent)],
        env=clean_environment | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


TRITON_BUILD = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pipeline.detectors.sampling import triton_kernel
blocks = {"BLOCK": 64, "DEPTH": 32}
wanted = {"WANTS_VALUE": True, "WANTS_SAMPLES": True}
for capability, half in ((75, "fp16"), (80, "bf16"), (90, "fp32")):
    pointers = dict.fromkeys(("value", "output", "gradient"), f"*{half}") | {"sizes": "*i32"}
    for name in ("locations", "weights", "grad_value", "grad_locations", "grad_weights"):
        pointers[name] = "*fp32"
    for kernel, constants in (
        (triton_kernel._forward, blocks), (triton_kernel._backward, blocks | wanted)
    ):
        types = {name: pointers.get(name, "i32") for name in kernel.arg_names}
        types |= dict.fromkeys(constants, "constexpr")
        made = compile(
            ASTSource(kernel, types, constexprs=constants),
            target=GPUTarget("cuda", capability, 32),
        )
        assert made.asm["cubin"], (capability, kernel)
"""


@pytest.mark.slow
def test_triton_compiles_for_gpus_that_are_not_here(
    clean_environment: dict[str, str], tmp_path: Path
) -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", TRITON_BUILD],
        env=clean_environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
