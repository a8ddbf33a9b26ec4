"""The sampling of multi-scale deformable attention: three ways, of one result."""

from pipeline.detectors.sampling.choice import KernelChoice, kernel_in_use, sample_and_sum
from pipeline.detectors.sampling.levels import Shapes, level_sizes

__all__ = ["KernelChoice", "Shapes", "kernel_in_use", "level_sizes", "sample_and_sum"]
