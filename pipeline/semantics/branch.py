"""The semantic branch (RichSem, section 3.3; supplement E.1): a linear layer into the teacher's
space that learns the teacher's soft labels. Training only."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.data.batch import Targets
from pipeline.detectors.interface import MatchedRegions


class SemanticBranch(nn.Module):
    """Class distribution of matched region features, and its divergence from the soft labels.

    `text_embeddings` (C, D), unit rows, is a buffer that stays out of checkpoints; `temperature`
    multiplies the cosine, as in the teacher.
    """

    text_embeddings: Tensor

    def __init__(self, feature_dim: int, text_embeddings: Tensor, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.projection = nn.Linear(feature_dim, text_embeddings.shape[1], bias=False)
        nn.init.normal_(self.projection.weight, std=text_embeddings.shape[1] ** -0.5)
        self.register_buffer("text_embeddings", text_embeddings.detach().clone(), persistent=False)

    def forward(
        self,
        matched: MatchedRegions,
        soft_labels: Sequence[Tensor],
        targets: Sequence[Targets],
        num_boxes: float,
    ) -> Tensor:
        """Sum over regions of KL(soft label || student), each weighted by its image's
        `semantic_weight` and divided by its `copies` and by `num_boxes`.

        `soft_labels` holds (N_i, C) for each image, summing to 1 over C.
        """
        counts = [len(labels) for labels in soft_labels]
        starts = torch.tensor([0, *counts[:-1]]).cumsum(0).to(matched.image.device)
        soft = torch.cat(list(soft_labels))[starts[matched.image] + matched.box].float()
        weight = soft.new_tensor([target.semantic_weight for target in targets])[matched.image]
        features = self.projection(matched.features)
        with torch.autocast(features.device.type, enabled=False):
            cosine = F.linear(F.normalize(features.float(), dim=-1), self.text_embeddings.float())
            student = (self.temperature * cosine).log_softmax(-1)
            divergence = F.kl_div(student, soft, reduction="none").sum(-1)
            return (divergence * weight / matched.copies).sum() / num_boxes
