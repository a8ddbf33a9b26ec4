"""Recipe sections on the detector: backbone, transformer, denoising, losses."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pipeline.recipe.section import Count, Fraction, NonNegative, Positive, PositiveCount, Section


class Backbone(Section):
    """A timm model that gives feature maps, or a plain ViT with a simple feature pyramid."""

    name: str = "resnet50"
    """A name of timm's, with or without the tag of published weights (`resnet50.tv_in1k`)."""
    weights: str | None = "pretrained"
    """`pretrained` (timm's own tag, from the hub), `hf-hub:OWNER/NAME` or `timm/NAME` (another
    address there), a local file (timm's or the authors' own names), or null for random."""
    out_indices: list[Count] = Field(default=[2, 3, 4], min_length=1)
    """Maps that go on, of those of the model: strides 2 to 32 of a ResNet are 0 to 4, strides 4 to
    32 of Swin, ConvNeXt, FocalNet and plain ViTs are 0 to 3."""
    output_norm: bool | None = None
    """LayerNorm on each map that goes out; null: where the model has no batch norm."""
    norm: Literal["frozen", "group", "own"] = "frozen"
    """Frozen batch norm (with trained weights), group norm (from scratch), or the model's own.
    Layer norms stay as they are, and train."""
    frozen_stages: Count = 2
    """How many leading stages, the stem included, do not train; a plain ViT has its embedding and
    then four quarters of its blocks."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """What the learning rate is multiplied by from each block to the one before it, beginning
    below 1 at the last block and ending with the stem."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Stochastic depth: the share of samples that skip the last block, less in earlier ones."""
    checkpointed_stages: Count = 0
    """How many stages after the stem compute their blocks again in the backward pass."""
    window_size: PositiveCount | None = None
    """Plain ViTs: side in patches of the windows that attend within themselves; null: 14."""
    global_blocks: Count | None = None
    """Plain ViTs: how many blocks, evenly spaced, attend to the whole image; null: 4."""
    arguments: dict[str, bool | int | float | str | list[int]] = Field(default={})
    """Passed to `timm.create_model`."""

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.out_indices != sorted(set(self.out_indices)):
            raise ValueError(
                f"out_indices {self.out_indices} must rise; maps go on finest first, each once"
            )
        return self


class ClassHead(Section):
    """Cosine to frozen text embeddings (RichSem), or a plain linear classifier (DINO)."""

    kind: Literal["language", "linear"] = "language"
    scale: Positive = 100.0
    bias: bool = True
    """A learned scalar bias of the language head, started so that scores begin near 0.01."""


class Denoising(Section):
    """Contrastive denoising (DINO, section 3.3); `num_queries` is fixed whatever the boxes."""

    num_queries: Count = 200
    label_noise: Fraction = 0.5
    box_noise: NonNegative = 1.0


class Losses(Section):
    """Weights of matching costs and of losses, and the two class losses."""

    cost_class: NonNegative = 2.0
    cost_box_l1: NonNegative = 5.0
    cost_box_giou: NonNegative = 2.0
    coarse_box_cost: Positive = 1.0
    """What the two box costs of coarse boxes (the whole of an image or part of a mosaic) are
    multiplied by. With 1, as the authors have it, the loosest query answers for the label; with
    less, the one that is surest of it has the better chance. Not 0: boxes without a label are
    matched by these costs alone. Nothing is matched where `image_level` is Detic's."""
    weight_class: NonNegative = 1.0
    weight_box_l1: NonNegative = 5.0
    weight_box_giou: NonNegative = 2.0
    focal_alpha: Fraction = 0.25
    focal_gamma: NonNegative = 2.0
    federated_categories: Count = 50
    """Columns of the federated class loss (Zhou et al. 2021); 0 uses every column."""
    federated_power: NonNegative = 0.5
    image_level: Literal["boxes", "max_size", "image_box", "max_score"] = "boxes"
    """What images with coarse labels teach: `boxes` takes the whole image for the object's box
    (RichSem). The others are Detic's image-level loss: no boxes, no matching and no denoising, but
    each label on one query, that of the largest predicted box, that which begins as a box over the
    whole image, or that which scores highest for the label."""
    weight_image_level: NonNegative = 0.1


class DetectorSection(Section):
    """DINO 4-scale by default."""

    kind: Literal["dino"] = "dino"
    backbone: Backbone = Backbone()
    hidden_dim: PositiveCount = 256
    num_heads: PositiveCount = 8
    num_points: PositiveCount = 4
    num_feature_levels: PositiveCount = 4
    encoder_layers: PositiveCount = 6
    decoder_layers: PositiveCount = 6
    ffn_dim: PositiveCount = 2048
    dropout: Fraction = 0.0
    num_queries: PositiveCount = 900
    shared_heads: bool = True
    """One class head and one box head for all decoder layers (DINO), or one each (detrex)."""
    position_temperature: Positive = 20.0
    """Of the sine encoding of the maps' cells; detrex has 10000."""
    position_offset: float = 0.0
    """Added to the cells' counts, from 1, before they are encoded; detrex has -0.5, the middle."""
    kernel: Literal["auto", "portable"] = "auto"
    """How deformable attention samples: `auto` takes Triton on a GPU, and on a CPU a kernel that is
    compiled when it is first used, where they work; `portable` is PyTorch alone, and deterministic
    on a GPU too."""
    class_head: ClassHead = ClassHead()
    denoising: Denoising = Denoising()
    losses: Losses = Losses()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.hidden_dim % (2 * self.num_heads):
            raise ValueError(
                f"hidden_dim {self.hidden_dim} must be a multiple of twice num_heads "
                f"{self.num_heads} (heads share it, and so do sine and cosine)"
            )
        if self.num_feature_levels < len(self.backbone.out_indices):
            raise ValueError(
                f"num_feature_levels {self.num_feature_levels} is fewer than the "
                f"{len(self.backbone.out_indices)} maps of backbone.out_indices"
            )
        return self
