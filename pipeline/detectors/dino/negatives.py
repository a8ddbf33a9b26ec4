"""Which categories the class loss takes as absent from an image, where its labels are not all.

A column of the federated class loss (Zhou et al. 2021) is a negative of every query that is matched
to nothing. On LVIS that is how it was meant: the few false negatives are accepted for a sample of
the vocabulary. A label of a whole image names one thing of many, so there what is not named is
unknown: with `Targets.sampled_negatives` off only these columns teach an image's queries:

- categories that its labels name: of those, queries that are matched to none of them are negatives,
  for an object is to be found once;
- categories verified as absent.

Named categories that are not exhaustively annotated teach matched queries alone. A query that
answers for a label does take all columns for negatives: whatever else is in the image, an object is
of one category.

Where one batch has images of both kinds, columns that only labels of whole images name, without
being sampled, are no negatives on LVIS: they are no sample, but mostly the rare categories that the
images were added for. So it is with the labels of Detic's images in any case.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pipeline.data.batch import Targets
from pipeline.detectors.dino.matcher import PaddedTargets


class Negatives(NamedTuple):
    """What a negative of each class column weighs in each image, 0 or 1, both (B, K) float32: for
    the queries that answer for a box, and for all others."""

    matched: Tensor
    unmatched: Tensor


def column_positions(class_columns: Tensor, num_categories: int) -> Tensor:
    """(C,) position of each category among the class columns (K,), -1 where it is not one."""
    position = class_columns.new_full((num_categories,), -1)
    position[class_columns] = torch.arange(len(class_columns), device=class_columns.device)
    return position


def negative_weights(
    targets: Sequence[Targets],
    padded: PaddedTargets,
    class_columns: Tensor | None,
    num_categories: int,
    sampled_columns: Tensor | None = None,
    spared: Sequence[Tensor] = (),
) -> Negatives | None:
    """The negatives of a batch; None where all columns count in all images, as on box data by
    default. `spared` are labels of each image that its unmatched queries do not learn as absent,
    though no box has them."""
    spares = any(len(labels) for labels in spared)
    if sampled_columns is None and not spares and all(t.sampled_negatives for t in targets):
        return None
    device = padded.columns.device
    if class_columns is None:
        count, position = num_categories, torch.arange(num_categories).to(device, non_blocking=True)
    else:
        count, position = len(class_columns), column_positions(class_columns, num_categories)
    # A column more for whatever is in none of them, and a category more for padding.
    place = torch.cat([position, position.new_full((1,), -1)])
    place = torch.where(place < 0, count, place)
    named = torch.where(padded.columns < 0, count, padded.columns)
    absent = _padded([target.negative_categories for target in targets], num_categories)
    partial = _padded([target.not_exhaustive_categories for target in targets], num_categories)
    weights = padded.boxes.new_zeros((len(targets), count + 1))
    weights = weights.scatter(1, named, 1.0)
    weights = weights.scatter(1, place[absent.to(device, non_blocking=True)], 1.0)
    weights = weights.scatter(1, place[partial.to(device, non_blocking=True)], 0.0)
    sampled = torch.tensor([[target.sampled_negatives] for target in targets])
    sampled = sampled.to(device, non_blocking=True)
    sample = weights.new_ones(count) if sampled_columns is None else sampled_columns.to(weights)
    unmatched = torch.where(sampled, sample, weights[:, :count])
    if spares:
        labels = pad_sequence(list(spared), batch_first=True, padding_value=-1)
        column = torch.where(labels < 0, count, place[labels])
        unmatched = F.pad(unmatched, (0, 1)).scatter(1, column, 0.0)[:, :count]
    return Negatives(torch.where(sampled, sample, 1.0), unmatched)


def _padded(categories: Sequence[tuple[int, ...]], padding: int) -> Tensor:
    """(B, M) int64 on the CPU, `padding` after each image's categories."""
    longest = max(len(each) for each in categories)
    return torch.tensor(
        [[*each, *[padding] * (longest - len(each))] for each in categories], dtype=torch.int64
    ).view(len(categories), longest)
