"""The semantic branch (RichSem, section 3.3; supplement E.1): a linear layer into the teacher's
space that learns the teacher's soft labels. Training only."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.data.batch import Targets
from pipeline.detectors.interface import MatchedRegions
from pipeline.recipe import Semantic
from pipeline.semantics.objectives import distance, divergence, entropy_weight, one_hot


class SemanticBranch(nn.Module):
    """Class distribution of matched region features, and its divergence from the soft labels.

    `text_embeddings` (C, D), unit rows, is a buffer that stays out of checkpoints; `temperature`
    multiplies the cosine, as in the teacher. `section` chooses the objective, the paper's by
    default.
    """

    text_embeddings: Tensor

    def __init__(
        self,
        feature_dim: int,
        text_embeddings: Tensor,
        temperature: float,
        section: Semantic | None = None,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.section = section or Semantic()
        self.projection = nn.Linear(feature_dim, text_embeddings.shape[1], bias=False)
        nn.init.normal_(self.projection.weight, std=text_embeddings.shape[1] ** -0.5)
        self.register_buffer("text_embeddings", text_embeddings.detach().clone(), persistent=False)

    def forward(
        self,
        matched: MatchedRegions,
        soft_labels: Sequence[Tensor] | None,
        targets: Sequence[Targets],
        num_boxes: float,
        class_columns: Tensor | None = None,
        shares: tuple[float, float] = (1.0, 1.0),
    ) -> Tensor:
        """Sum over regions of KL(soft label || student), each weighted by its image's
        `semantic_weight` and the share of its stream, and divided by its `copies` and by
        `num_boxes`.

        `soft_labels` holds (N_i, C) for each image, summing to 1 over C; for the objective
        `features` the teacher's (N_i, D) embeddings, of unit length; None for hard labels, which
        are those of `targets`. `class_columns` (K,) are for `columns: federated`.
        """
        device = matched.image.device
        weights = torch.tensor([t.semantic_weight * shares[t.extra] for t in targets])
        weight = weights.to(device, non_blocking=True)[matched.image] / matched.copies
        features = self.projection(matched.features)
        with torch.autocast(features.device.type, enabled=False):
            unit = F.normalize(features.float(), dim=-1)
            if self.section.labels == "hard":
                labels = _of_regions(matched, [target.labels for target in targets])
                taught = one_hot(labels, len(self.text_embeddings))
                weight = weight * (labels >= 0)
            else:
                assert soft_labels is not None, "the semantic branch needs what the teacher gives"
                taught = _of_regions(matched, soft_labels).float()
            if self.section.objective == "features":
                return (distance(unit, taught) * weight).sum() / num_boxes
            if self.section.entropy_weighting:
                weight = weight * entropy_weight(taught)
            columns = class_columns if self.section.columns == "federated" else None
            logits = self.temperature * F.linear(unit, self.text_embeddings.float())
            return (divergence(logits, taught, columns) * weight).sum() / num_boxes


def _of_regions(matched: MatchedRegions, values: Sequence[Tensor]) -> Tensor:
    """(M, ...) rows of the regions' boxes, from each image's (N_i, ...)."""
    counts = [len(each) for each in values]
    starts = torch.tensor([0, *counts[:-1]]).cumsum(0)
    starts = starts.to(matched.image.device, non_blocking=True)
    return torch.cat(list(values))[starts[matched.image] + matched.box]
