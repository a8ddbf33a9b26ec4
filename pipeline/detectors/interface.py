"""What every detector gives: predictions, named losses, and matched region features."""

from typing import NamedTuple, Protocol

from torch import Tensor

from pipeline.data.batch import Targets


class Predictions(NamedTuple):
    """Raw output for a batch: `logits` (B, Q, C) before the sigmoid, `boxes` (B, Q, 4) cxcywh
    as fractions of the unpadded image."""

    logits: Tensor
    boxes: Tensor


class MatchedRegions(NamedTuple):
    """Region features that were matched to ground truth.

    `features` is (M, D); `image` and `box` are (M,) int64: the box index inside that image's
    targets. `copies` (M,) is how often the region's box appears (the denoising groups of its image;
    1 for Hungarian matches): losses over regions divide by it, so that each box counts once.
    """

    features: Tensor
    image: Tensor
    box: Tensor
    copies: Tensor


class TrainingOutput(NamedTuple):
    """Losses of a micro-batch by log key, unweighted by gradient accumulation or world size, and
    what the semantic branch learns from: `matched` regions, then denoising ones where there are
    any, of the last layer; `earlier` has the same of each layer before it, from the first on."""

    losses: dict[str, Tensor]
    matched: tuple[MatchedRegions, ...]
    earlier: tuple[tuple[MatchedRegions, ...], ...] = ()


class Shares(NamedTuple):
    """What class, box and semantic terms of an image weigh in the train and in the extra stream.

    Losses are divided by the boxes of the whole batch, and these put those in their place that have
    the term, in the image's own stream: a batch of both is the sum of a step of each. In a batch of
    one stream whose boxes have all terms they are 1.
    """

    classes: tuple[float, float] = (1.0, 1.0)
    boxes: tuple[float, float] = (1.0, 1.0)
    semantics: tuple[float, float] = (1.0, 1.0)


class LossContext(NamedTuple):
    """What is known of the whole global batch before its first micro-step.

    `num_boxes` is the number of boxes in the global batch (at least 1), which all terms of boxes
    are divided by, and `shares` what they are multiplied by, stream by stream. `class_columns` is
    (K,) int64, the columns that the federated class loss visits, or None for all of them;
    `sampled_columns` (K,) bool are those of them that count as absent where `sampled_negatives` of
    an image says so, None for all. They are the same on every rank and in every micro-step.
    `num_images` is the number of image-level images, which their losses are divided by.
    """

    num_boxes: float
    class_columns: Tensor | None
    num_images: float = 1.0
    sampled_columns: Tensor | None = None
    shares: Shares = Shares()


class Detector(Protocol):
    """A detector: `forward(images, mask)` gives `Predictions`; with targets and context it gives
    `TrainingOutput`.

    `images` is (B, 3, H, W) float32 normalised by `pixel_mean` and `pixel_std`, `mask` (B, H, W)
    bool, True on padding.
    """

    pixel_mean: tuple[float, float, float]
    pixel_std: tuple[float, float, float]
    feature_dim: int
    class_heads: tuple[str, ...]
    """Its parts that are made of text, or of one row a category: another kind of head has others
    under the same names."""

    def forward(
        self,
        images: Tensor,
        mask: Tensor,
        targets: list[Targets] | None = None,
        context: LossContext | None = None,
    ) -> Predictions | TrainingOutput: ...

    def category_parameters(self) -> dict[str, int]:
        """Names of parameters and buffers with one row per category, and the axis of the rows."""
        ...
