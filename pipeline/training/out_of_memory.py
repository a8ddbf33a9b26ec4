"""Memory that is not there, as an error of the recipe that says what to lower (free of torch)."""

from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.data.plan.geometry import largest_canvas
from pipeline.errors import MemoryExceeded
from pipeline.recipe import Recipe

SIGNS = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
)
"""In messages of torch, where the class of the error does not tell."""
GPU_WORDS = ("CUDA", "CUBLAS")
"""In messages of an allocation on a GPU."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the host."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or any(sign in str(error) for sign in SIGNS)


@contextmanager
def memory_explained(recipe: Recipe, rank: int) -> Iterator[None]:
    """Raises `MemoryExceeded` in the place of a failed allocation inside the block."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        said = str(error).strip().partition("\n")[0][:300] or type(error).__name__
        what = f"rank {rank} ran out of memory ({said})"
        gpu = any(word in said for word in GPU_WORDS)
        raise MemoryExceeded(memory_advice(recipe, what, of_gpu=gpu)) from error


def memory_advice(recipe: Recipe, what: str, *, of_gpu: bool = False) -> str:
    """`what` happened, the largest batch that the recipe makes, and the keys that lower its use of
    a host's memory or, with `of_gpu`, of a GPU's."""
    data, training, backbone = recipe.data, recipe.training, recipe.detector.backbone
    mosaics = bool(data.extra) and data.transforms.mosaic
    height, width = largest_canvas(data.transforms, training.micro_batch, mosaics=mosaics)
    keys = []
    if training.micro_batch > 1:
        keys.append(f"training.micro_batch (now {training.micro_batch})")
    if not training.activation_checkpointing:
        keys.append("training.activation_checkpointing=true")
    if not backbone.checkpointed_stages:
        keys.append("detector.backbone.checkpointed_stages=1")
    if training.zero_stage < 3 and recipe.cluster.max_workers > 1:
        keys.append(f"a higher training.zero_stage (now {training.zero_stage})")
    if of_gpu and training.offload == "none":
        keys.append("training.offload=optimizer (from training.zero_stage=1 on)")
    elif of_gpu and training.offload == "optimizer":
        keys.append("training.offload=all (with training.zero_stage=3)")
    alike = f"by {', '.join(keys)}, or, " if keys else "which is possible only by "
    return (
        f"{what}; a micro-batch has up to {training.micro_batch} x {height}x{width} pixels. Lower "
        f"what a worker holds, {alike}changing what is learnt{', by' if keys else ':'} data."
        f"transforms.max_side (now {data.transforms.max_side}) or data.max_boxes (now "
        f"{data.max_boxes}). `longtail check RECIPE --gpu-memory GB` predicts what is needed"
    )
