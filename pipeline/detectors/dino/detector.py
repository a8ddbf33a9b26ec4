"""DINO (Zhang et al. 2022), four-scale, with a language or a linear class head."""

import torch
from torch import Tensor, nn

from pipeline import recipe
from pipeline.data.batch import Targets
from pipeline.detectors.backbone import Backbone, FeatureMap, group_norm, resize_mask
from pipeline.detectors.boxes import inverse_sigmoid
from pipeline.detectors.dino.denoising import DenoisingLayout, make_denoising
from pipeline.detectors.dino.heads import LanguageHead, LinearHead
from pipeline.detectors.dino.losses import (
    LayerOutputs,
    Outputs,
    compute_losses,
)
from pipeline.detectors.dino.matcher import Matches
from pipeline.detectors.dino.transformer import (
    MLP,
    Decoder,
    Encoder,
    Memory,
    Queries,
    QuerySelection,
    flatten_maps,
    map_position,
)
from pipeline.detectors.interface import (
    LossContext,
    MatchedRegions,
    Predictions,
    TrainingOutput,
)
from pipeline.errors import RecipeError


class DinoDetector(nn.Module):
    """The detector of the recipe; see `pipeline.detectors.interface.Detector`.

    `text_embeddings` (num_categories, D), unit rows, belong to the language head; they are kept as
    a buffer and go into checkpoints.
    """

    text_embeddings: Tensor | None

    def __init__(
        self,
        section: recipe.DetectorSection,
        num_categories: int,
        text_embeddings: Tensor | None,
        *,
        pretrained: bool = True,
    ) -> None:
        super().__init__()
        self.section, self.num_categories = section, num_categories
        dim = self.feature_dim = section.hidden_dim
        self.backbone = Backbone(section.backbone, pretrained=pretrained)
        self.pixel_mean, self.pixel_std = self.backbone.pixel_mean, self.backbone.pixel_std
        self.input_proj = _input_projections(self.backbone.channels, section)
        self.encoder = Encoder(section)
        self.query_selection = QuerySelection(section)
        self.decoder = Decoder(section)
        text_embeddings = _checked_text(section, num_categories, text_embeddings)
        self.register_buffer("text_embeddings", text_embeddings)
        self.class_embed, self.encoder_class_embed = self._class_head(), self._class_head()
        self.bbox_embed, self.encoder_bbox_embed = _box_head(dim), _box_head(dim)
        if section.denoising.num_queries:
            self.label_embed = self._label_embedding()

    def forward(
        self,
        images: Tensor,
        mask: Tensor,
        targets: list[Targets] | None = None,
        context: LossContext | None = None,
    ) -> Predictions | TrainingOutput:
        """See `pipeline.detectors.interface.Detector`."""
        maps = self._feature_maps(images, mask)
        positions = [map_position(level.mask, self.feature_dim) for level in maps]
        memory = self.encoder(flatten_maps(maps), positions)
        queries, cells = self.query_selection(memory, self._best_score, self.encoder_bbox_embed)
        if targets is None:
            return self._predict(queries, memory)
        assert context is not None, "targets need a loss context"
        return self._losses(queries, cells, memory, targets, context)

    def category_parameters(self) -> dict[str, int]:
        """Names of parameters and buffers with one row per category, and the axis of the rows."""
        if self.text_embeddings is not None:
            return {"text_embeddings": 0}
        heads = ("class_embed", "encoder_class_embed")
        names = [f"{head}.{part}" for head in heads for part in ("weight", "bias")]
        if self.section.denoising.num_queries:
            names.append("label_embed.weight")
        return dict.fromkeys(names, 0)

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Whether transformer layers are computed again in the backward pass to save memory."""
        self.encoder.activation_checkpointing = enabled
        self.decoder.activation_checkpointing = enabled

    def _feature_maps(self, images: Tensor, mask: Tensor) -> list[FeatureMap]:
        """Levels of hidden_dim channels: those of the backbone, then ever coarser ones."""
        maps = self.backbone(images, mask)
        x = maps[-1].features
        levels = []
        for i, projection in enumerate(self.input_proj):
            if i < len(maps):
                levels.append(FeatureMap(projection(maps[i].features), maps[i].mask))
                continue
            x = projection(x)
            levels.append(FeatureMap(x, resize_mask(mask, (x.shape[2], x.shape[3]))))
        return levels

    def _predict(self, queries: Queries, memory: Memory) -> Predictions:
        decoded = self.decoder(queries, memory, self.bbox_embed, None)
        hidden, reference = decoded.hidden[-1], decoded.references[-1]
        return Predictions(
            self._classify(self.class_embed, hidden, None), self._boxes(hidden, reference)
        )

    def _losses(
        self,
        queries: Queries,
        cells: Queries,
        memory: Memory,
        targets: list[Targets],
        context: LossContext,
    ) -> TrainingOutput:
        layout, attention = None, None
        num_matching, num_denoising = queries.boxes.shape[1], 0
        if self.section.denoising.num_queries:
            layout = make_denoising(self.section.denoising, targets, self.num_categories)
            attention = layout.attention_mask(num_matching)
            num_denoising = layout.group.shape[1]
            queries = Queries(
                torch.cat([self._embed_labels(layout.labels), queries.content], dim=1),
                torch.cat([layout.boxes, queries.boxes], dim=1),
            )
        decoded = self.decoder(queries, memory, self.bbox_embed, attention)
        columns = context.class_columns
        predicted = LayerOutputs(
            self._classify(self.class_embed, decoded.hidden, columns),
            self._boxes(decoded.hidden, decoded.references),
        )
        denoising, matching = (
            LayerOutputs(*parts)
            for parts in zip(
                predicted.logits.split([num_denoising, num_matching], dim=2),
                predicted.boxes.split([num_denoising, num_matching], dim=2),
                strict=True,
            )
        )
        encoder = LayerOutputs(
            self._classify(self.encoder_class_embed, cells.content, columns)[None],
            cells.boxes[None],
        )
        outputs = Outputs(matching, encoder, denoising if layout else None, layout)
        with torch.autocast(decoded.hidden.device.type, enabled=False):
            losses, matches = compute_losses(
                self.section.losses, outputs, targets, context, self.num_categories
            )
        hidden = decoded.hidden[-1]
        return TrainingOutput(losses, _regions(hidden, num_denoising, matches, layout))

    def _class_head(self) -> LanguageHead | LinearHead:
        head, dim = self.section.class_head, self.feature_dim
        if self.text_embeddings is None:
            return LinearHead(dim, self.num_categories)
        return LanguageHead(dim, self.text_embeddings.shape[1], head.scale, bias=head.bias)

    def _label_embedding(self) -> nn.Module:
        if self.text_embeddings is None:
            return nn.Embedding(self.num_categories, self.feature_dim)
        return nn.Linear(self.text_embeddings.shape[1], self.feature_dim, bias=False)

    def _embed_labels(self, labels: Tensor) -> Tensor:
        """(B, N) labels to (B, N, dim) content of denoising queries."""
        if self.text_embeddings is None:
            return self.label_embed(labels)
        return self.label_embed(self.text_embeddings[labels])

    def _classify(self, head: nn.Module, features: Tensor, columns: Tensor | None) -> Tensor:
        """Float32 logits of all categories, or of `columns` only."""
        if self.text_embeddings is None:
            return head(features, columns)
        text = self.text_embeddings if columns is None else self.text_embeddings[columns]
        return head(features, text)

    def _best_score(self, cells: Tensor) -> Tensor:
        return self._classify(self.encoder_class_embed, cells, None).amax(-1)

    def _boxes(self, hidden: Tensor, reference: Tensor) -> Tensor:
        """Float32 cxcywh boxes from the normed features and the boxes that entered the layer."""
        return (self.bbox_embed(hidden).float() + inverse_sigmoid(reference)).sigmoid()


def _regions(
    hidden: Tensor, num_denoising: int, matches: Matches, layout: DenoisingLayout | None
) -> tuple[MatchedRegions, ...]:
    """What the last layer's features (B, T, dim) were matched to; denoising queries come first."""
    last = len(matches.image) - 2  # the encoder's matches follow those of the decoder layers
    image, query, box = matches.image[last], matches.query[last], matches.box[last]
    features = hidden[image, num_denoising + query]
    matched = MatchedRegions(features, image, box, features.new_ones(len(features)).float())
    if layout is None:
        return (matched,)
    copies = layout.weight[layout.image, layout.query].reciprocal()
    positives = hidden[layout.image, layout.query]
    return matched, MatchedRegions(positives, layout.image, layout.box, copies)


def _input_projections(channels: list[int], section: recipe.DetectorSection) -> nn.ModuleList:
    """1x1 to hidden_dim for each map of the backbone; 3x3 with stride 2 for each coarser level."""
    dim = section.hidden_dim
    convolutions = [nn.Conv2d(width, dim, kernel_size=1) for width in channels]
    for level in range(len(channels), section.num_feature_levels):
        width = channels[-1] if level == len(channels) else dim
        convolutions.append(nn.Conv2d(width, dim, kernel_size=3, stride=2, padding=1))
    for convolution in convolutions:
        nn.init.xavier_uniform_(convolution.weight)
        assert convolution.bias is not None
        nn.init.zeros_(convolution.bias)
    return nn.ModuleList(nn.Sequential(conv, group_norm(dim)) for conv in convolutions)


def _box_head(dim: int) -> MLP:
    """Box deltas before the sigmoid, zero at the start."""
    head = MLP(dim, dim, 4, 3)
    last = head.layers[-1]
    assert isinstance(last, nn.Linear)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return head


def _checked_text(
    section: recipe.DetectorSection, num_categories: int, text_embeddings: Tensor | None
) -> Tensor | None:
    """Text embeddings that fit the class head, or None for a linear one."""
    if section.class_head.kind == "linear":
        return None
    if text_embeddings is None:
        raise RecipeError(
            "detector.class_head.kind is language, which needs text embeddings of a teacher; "
            "give them, or choose kind linear"
        )
    if text_embeddings.shape[0] != num_categories:
        raise RecipeError(
            f"{text_embeddings.shape[0]} text embeddings do not fit {num_categories} categories; "
            "they must come from one vocabulary"
        )
    return text_embeddings.detach().clone().float()
