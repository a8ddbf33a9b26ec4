"""Class heads: cosine to text embeddings (RichSem) or a plain linear layer (DINO)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PRIOR = 0.01
"""Mean score that class heads start from (RetinaNet, section 4.1)."""


class LinearHead(nn.Module):
    """One weight row and one bias for each category, biased towards `PRIOR`."""

    def __init__(self, dim: int, num_categories: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_categories, dim))
        self.bias = nn.Parameter(torch.full((num_categories,), -math.log((1 - PRIOR) / PRIOR)))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x: Tensor, columns: Tensor | None = None) -> Tensor:
        """(..., K) float32 logits of (..., dim), of all categories or those of `columns` (K,)."""
        rows = slice(None) if columns is None else columns
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight[rows], self.bias[rows])


class LanguageHead(nn.Module):
    """Cosine between the projected feature and the text embeddings, times `scale`.

    The text matrix is passed in, so that two heads do not keep two copies.
    """

    def __init__(self, dim: int, text_dim: int, scale: float, *, bias: bool) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(text_dim, dim))
        self.bias = nn.Parameter(torch.tensor([_prior_bias(scale, text_dim)])) if bias else None
        nn.init.normal_(self.weight, std=text_dim**-0.5)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """(..., K) float32 logits of (..., dim), for unit rows `text` (K, text_dim)."""
        with torch.autocast(x.device.type, enabled=False):
            x, text = x.float(), text.float()
            if self.weight.shape[0] > self.weight.shape[1]:
                logits = self._folded(x, text)
            else:
                logits = F.linear(F.normalize(F.linear(x, self.weight), dim=-1), text)
            logits = logits * self.scale
            return logits if self.bias is None else logits + self.bias

    def _folded(self, x: Tensor, text: Tensor) -> Tensor:
        """The same cosine without the wide projection: it goes into the text matrix, and its Gram
        matrix gives the norm."""
        gram = self.weight.T @ self.weight
        squared = (F.linear(x, gram) * x).sum(-1, keepdim=True)
        return F.linear(x, text @ self.weight) * squared.clamp(min=1e-12).rsqrt()


def _prior_bias(scale: float, text_dim: int) -> float:
    """The bias at which the mean score is `PRIOR`, the cosine of random directions being normal
    with variance `1 / text_dim`; by bisection over that distribution's quantiles."""
    # On the CPU whatever the default device: a model may be built on meta, which has no values.
    quantiles = (torch.arange(2000, dtype=torch.float64, device="cpu") + 0.5) / 2000
    logits = math.sqrt(2) * torch.erfinv(2 * quantiles - 1) * scale * text_dim**-0.5
    low, high = -10 * scale, 0.0
    for _ in range(60):
        middle = (low + high) / 2
        if float((logits + middle).sigmoid().mean()) > PRIOR:
            high = middle
        else:
            low = middle
    return (low + high) / 2
