"""Memory that is not there: an error that names the rank, the images and what to lower."""

from pathlib import Path

import pytest
import torch
from tiny_world import prepare, run_command, tiny_recipe, write_recipe

from pipeline.errors import MemoryExceeded
from pipeline.training.manifest import newest_verified, read_manifest
from pipeline.training.out_of_memory import memory_explained

LIMITED = """
import os, resource, sys
os.environ["TORCHELASTIC_RUN_ID"] = "alone"  # In this process, without Ray.
from pipeline.cli import main
from pipeline.training import loop

def limit(step, loss):
    # From the second step on this process gets less than the activations of 64 images take.
    if step < 2:
        return False
    most = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + 2**26
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    return False

train = loop.train
loop.train = lambda recipe, device, check_in, evaluate: train(recipe, device, limit, evaluate)
main(["train", sys.argv[1]])
"""


def test_a_failed_allocation_names_rank_images_and_keys(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, "any")
    with pytest.raises(MemoryExceeded) as caught, memory_explained(recipe, 3):
        torch.empty(2**50, dtype=torch.uint8)
    said = str(caught.value)
    assert caught.value.exit_code == 78
    assert "rank 3 ran out of memory (" in said and "llocate" in said
    assert "up to 2 x 96x96 pixels" in said
    for key in ("micro_batch (now 2)", "activation_checkpointing=true", "max_side (now 96)"):
        assert key in said
    with pytest.raises(RuntimeError, match="another"), memory_explained(recipe, 0):
        raise RuntimeError("another fault")


def test_advice_names_what_is_left_to_lower_and_nothing_that_is_not(tmp_path: Path) -> None:
    least = {"micro_batch": 1, "activation_checkpointing": True, "zero_stage": 3}
    backbone = tiny_recipe(tmp_path, "any").detector.backbone.model_dump()
    stages = {"backbone": {**backbone, "checkpointed_stages": 4}}

    def advice(offload: str, failed: str) -> str:
        training = {**least, "offload": offload}
        recipe = tiny_recipe(tmp_path, "low", training=training, detector=stages)
        with pytest.raises(MemoryExceeded) as caught, memory_explained(recipe, 0):
            raise RuntimeError(failed)
        return str(caught.value)

    of_gpu, of_host = "CUDA out of memory. Tried to", "DefaultCPUAllocator: not enough memory"
    first, second = advice("none", of_gpu), advice("optimizer", of_gpu)
    assert "holds, by training.offload=optimizer (from training.zero_stage=1 on), or, " in first
    assert "holds, by training.offload=all (with training.zero_stage=3), or, changing" in second
    for nothing in (advice("all", of_gpu), advice("none", of_host)):
        assert "holds, which is possible only by changing what is learnt: data.transf" in nothing
        assert "offload" not in nothing and "by ," not in nothing


@pytest.mark.slow
def test_a_run_whose_memory_is_used_up_ends_with_that_error_and_goes_on_with_less(
    tmp_path: Path,
) -> None:
    prepare(tmp_path)
    training = {"steps": 4, "batch_size": 64, "micro_batch": 64, "checkpoint_every": 1}
    recipe = tiny_recipe(tmp_path, "full", training=training)
    (tmp_path / "limited.py").write_text(LIMITED)
    path = str(write_recipe(tmp_path, recipe))
    done = run_command(str(tmp_path / "limited.py"), path)
    assert done.returncode == 78, done.stderr[-3000:]
    assert "rank 0 ran out of memory (" in done.stderr
    assert "Traceback" not in done.stderr
    trained_up_to = read_manifest(newest_verified(recipe.run_dir)).step
    assert 0 < trained_up_to < 4
    less = ["training.micro_batch=8", "training.activation_checkpointing=true"]
    done = run_command("-m", "pipeline", "train", path, *less)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "going on from" in done.stderr
    assert read_manifest(newest_verified(recipe.run_dir)).step == 4
