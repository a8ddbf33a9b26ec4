"""What the losses of a step know of its global batch: normalisers, and the categories that the
federated class loss visits."""

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.detectors.interface import LossContext
from pipeline.recipe import Losses
from pipeline.training.agreement import StepFacts


def class_columns(
    present: NDArray[np.bool_],
    image_counts: NDArray[np.int64],
    section: Losses,
    seed: int,
    step: int,
) -> NDArray[np.int64] | None:
    """Columns of the federated class loss in a step (Zhou et al. 2021), ascending, or None for all.

    Those that are `present` in the global batch, in images that take the sample for negatives,
    filled up to `federated_categories` with others drawn without replacement, with probability
    proportional to image_count ** federated_power. A pure function of its arguments.
    """
    if not 0 < section.federated_categories < len(present):
        return None
    uniform = np.random.Generator(np.random.Philox(key=[seed, step])).random(len(present))
    weights = image_counts.astype(np.float64) ** section.federated_power
    weights[(image_counts == 0) | present] = 0
    # The largest values of u ** (1 / w) are a weighted sample (Efraimidis and Spirakis 2006).
    with np.errstate(divide="ignore"):
        keys = np.where(weights > 0, np.log(uniform) / weights, -np.inf)
    number = max(0, section.federated_categories - int(present.sum()))
    drawn = np.argsort(-keys, kind="stable")[:number]
    drawn = drawn[weights[drawn] > 0]
    return np.union1d(np.flatnonzero(present), drawn)


def loss_context(
    facts: StepFacts,
    image_counts: NDArray[np.int64],
    section: Losses,
    seed: int,
    step: int,
    device: torch.device,
) -> LossContext:
    """The context of a step: columns are its sample, and what else labels of whole images name."""
    columns, sampled = None, None
    sample = class_columns(facts.sampled > 0, image_counts, section, seed, step)
    if sample is not None:
        every = np.union1d(sample, np.flatnonzero(facts.labelled))
        # Without a column there would be no class loss at all: then it visits the vocabulary.
        columns = torch.from_numpy(every).to(device) if len(every) else None
        if len(every) > len(sample):
            sampled = torch.from_numpy(np.isin(every, sample)).to(device)
    return LossContext(
        max(1.0, facts.num_boxes), columns, max(1.0, facts.coarse_images), sampled, facts.shares
    )
