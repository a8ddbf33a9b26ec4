"""DINO (Zhang et al. 2022), four-scale or five-scale, with a language or a linear class head."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import recipe
from pipeline.data.batch import Targets, check_targets
from pipeline.detectors.attention import use_kernel
from pipeline.detectors.backbone import Backbone, FeatureMap, group_norm, resize_mask
from pipeline.detectors.boxes import inverse_sigmoid
from pipeline.detectors.dino.denoising import make_denoising
from pipeline.detectors.dino.heads import LanguageHead, LinearHead
from pipeline.detectors.dino.image_level import (
    choose_queries,
    image_labels,
    image_level_losses,
    spared_labels,
    with_image_boxes,
    without_image_level,
)
from pipeline.detectors.dino.losses import (
    LayerOutputs,
    Outputs,
    compute_losses,
)
from pipeline.detectors.dino.regions import features_at, matched_regions, with_chosen
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
from pipeline.errors import DataError, RecipeError


class LayerHeads(nn.ModuleList):
    """A head for each decoder layer (detrex): layer i of (L, ...) features has the i-th."""

    def forward(self, features: Tensor, *rest: Tensor | None) -> Tensor:
        parts = zip(self, features, strict=True)
        return torch.stack([head(part, *rest) for head, part in parts])


class DinoDetector(nn.Module):
    """The detector of the recipe; see `pipeline.detectors.interface.Detector`.

    `text_embeddings` (num_categories, D) belong to the language head, which looks at their
    directions alone; the embedding of denoising labels reads them as they are (RichSem's are not
    of unit length). They are kept as a buffer and go into checkpoints.
    """

    text_embeddings: Tensor | None
    class_heads = ("class_embed", "encoder_class_embed", "label_embed")

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
        use_kernel(self, section.kernel)
        text_embeddings = _checked_text(section, num_categories, text_embeddings)
        self.register_buffer("text_embeddings", text_embeddings)
        self.class_embed, self.bbox_embed = self._class_head(), _box_head(dim)
        # The encoder's heads are others, but start as the decoder's do (official code).
        self.encoder_class_embed = copy.deepcopy(self.class_embed)
        self.encoder_bbox_embed = copy.deepcopy(self.bbox_embed)
        if not section.shared_heads:
            for name in ("class_embed", "bbox_embed"):
                head = getattr(self, name)
                layers = [copy.deepcopy(head) for _ in range(section.decoder_layers)]
                setattr(self, name, LayerHeads(layers))
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
        if targets is not None:
            self._check(targets, len(images))
        maps = self._feature_maps(images, mask)
        section = self.section
        encoding = section.hidden_dim, section.position_temperature, section.position_offset
        positions = [map_position(level.mask, *encoding) for level in maps]
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
        heads = ["class_embed", "encoder_class_embed"]
        if isinstance(self.class_embed, LayerHeads):
            heads[:1] = [f"class_embed.{layer}" for layer in range(len(self.class_embed))]
        names = [f"{head}.{part}" for head in heads for part in ("weight", "bias")]
        if self.section.denoising.num_queries:
            names.append("label_embed.weight")
        return dict.fromkeys(names, 0)

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Whether transformer layers are computed again in the backward pass to save memory."""
        self.encoder.activation_checkpointing = enabled
        self.decoder.activation_checkpointing = enabled

    def _check(self, targets: list[Targets], num_images: int) -> None:
        """Values are looked at only where that does not wait for a GPU."""
        if len(targets) != num_images:
            raise DataError(f"{num_images} images have {len(targets)} targets; give one for each")
        if all(target.boxes.device.type == "cpu" for target in targets):
            check_targets(targets, self.num_categories)

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
        box_heads = self._of_layers(self.bbox_embed)
        decoded = self.decoder(queries, memory, box_heads, None)
        hidden, reference = decoded.hidden[-1], decoded.references[-1]
        return Predictions(
            self._classify(self._of_layers(self.class_embed)[-1], hidden, None),
            _boxes(box_heads[-1], hidden, reference),
        )

    def _losses(
        self,
        queries: Queries,
        cells: Queries,
        memory: Memory,
        targets: list[Targets],
        context: LossContext,
    ) -> TrainingOutput:
        section = self.section.losses
        given, targets = targets, without_image_level(section, targets)
        queries = queries._replace(boxes=with_image_boxes(section, queries.boxes, given))
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
        decoded = self.decoder(queries, memory, self._of_layers(self.bbox_embed), attention)
        columns = context.class_columns
        predicted = LayerOutputs(
            self._classify(self.class_embed, decoded.hidden, columns),
            _boxes(self.bbox_embed, decoded.hidden, decoded.references),
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
                section,
                outputs,
                targets,
                context,
                self.num_categories,
                spared_labels(section, given),
            )
        regions = matched_regions(decoded.hidden, num_denoising, matches, layout)
        if section.image_level != "boxes":
            hidden = decoded.hidden[:, :, num_denoising:]
            found, regions = self._image_level(hidden, matching, given, context, regions)
            losses |= found
        return TrainingOutput(losses, regions[-1], tuple(regions[:-1]))

    def _image_level(
        self,
        hidden: Tensor,
        matching: LayerOutputs,
        targets: list[Targets],
        context: LossContext,
        regions: list[tuple[MatchedRegions, ...]],
    ) -> tuple[dict[str, Tensor], list[tuple[MatchedRegions, ...]]]:
        """Losses of the image-level labels, and the regions with those that they fall on."""
        section, columns = self.section.losses, context.class_columns
        labels = image_labels(section, targets)
        query = choose_queries(section, *matching, labels, columns, self.num_categories)
        features = features_at(hidden, labels.image, query)
        # The whole vocabulary, and not the step's columns: it is one query for each label.
        logits = self._classify(self.class_embed, features, None)
        with torch.autocast(hidden.device.type, enabled=False):
            losses = image_level_losses(section, logits, labels, context)
        return losses, with_chosen(regions, features, labels)

    def _class_head(self) -> LanguageHead | LinearHead:
        head, dim = self.section.class_head, self.feature_dim
        if self.text_embeddings is None:
            return LinearHead(dim, self.num_categories)
        return LanguageHead(dim, self.text_embeddings.shape[1], head.scale, bias=head.bias)

    def _label_embedding(self) -> nn.Module:
        if self.text_embeddings is None:
            return nn.Embedding(self.num_categories, self.feature_dim)
        projection = nn.Linear(self.text_embeddings.shape[1], self.feature_dim, bias=False)
        nn.init.normal_(projection.weight, std=projection.in_features**-0.5)
        return projection

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
        return head(features, F.normalize(text, dim=-1))

    def _best_score(self, cells: Tensor) -> Tensor:
        return self._classify(self.encoder_class_embed, cells, None).amax(-1)

    def _of_layers(self, heads: nn.Module) -> list[nn.Module]:
        """The head of each decoder layer."""
        if isinstance(heads, LayerHeads):
            return list(heads)
        return [heads] * self.section.decoder_layers


def _boxes(head: nn.Module, hidden: Tensor, reference: Tensor) -> Tensor:
    """Float32 cxcywh boxes from the normed features and the boxes that entered the layer."""
    return (head(hidden).float() + inverse_sigmoid(reference)).sigmoid()


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
