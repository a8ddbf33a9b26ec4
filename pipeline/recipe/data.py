"""Recipe sections on data: sources, transforms, and how the two streams are mixed."""

import difflib
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pipeline.recipe.section import Count, Fraction, NonNegative, Positive, PositiveCount, Section


class SourceFiles(Section):
    """Published files that a format has beside its annotations; paths relative to `data.root`."""

    classes: str | None = None
    """openimages: csv of class descriptions, LabelName and DisplayName. cc3m, cc12m: a json of
    LVIS or COCO, or a vocabulary, whose categories are looked for in captions."""
    image_labels: str | None = None
    """openimages: csv of human-verified image-level labels."""
    hierarchy: str | None = None
    """openimages: json of which class is a kind of which."""
    image_data: str | None = None
    """visual_genome: image_data.json, with the sizes and places of the images."""
    aliases: str | None = None
    """visual_genome: object_alias.txt, in whose lines the first name stands for all."""


@dataclass(frozen=True)
class FormatFiles:
    """Which keys of a source a format needs, and which `files` it may have beside them."""

    needs: tuple[str, ...] = ("annotations",)
    may: tuple[str, ...] = ()
    flags: bool = False
    """Whether boxes carry a flag that `keep_flagged` is about."""


FORMATS = {
    "lvis": FormatFiles(),
    "coco": FormatFiles(flags=True),
    "objects365": FormatFiles(flags=True),
    "voc": FormatFiles(flags=True),
    "openimages": FormatFiles(
        needs=("annotations", "files.classes"),
        may=("files.image_labels", "files.hierarchy"),
        flags=True,
    ),
    "visual_genome": FormatFiles(needs=("annotations", "files.image_data"), may=("files.aliases",)),
    "imagenet21k": FormatFiles(needs=(), may=("annotations",)),
    "cc3m": FormatFiles(needs=(), may=("annotations", "files.classes")),
    "cc12m": FormatFiles(needs=(), may=("annotations", "files.classes")),
}

CAPTION_FORMATS = ("cc3m", "cc12m")
"""Captioned images; their labels are the categories of `files.classes` that captions name."""

IMAGE_LEVEL_FORMATS = ("imagenet21k", *CAPTION_FORMATS)
"""Formats whose labels are of whole images: coarse, and naming only some of what is there."""

WRITTEN_TRUTH = ("openimages", "visual_genome")
"""Formats whose ground truth `prepare` writes in COCO's form, beside the shards of a validation
source; see `shards/ground_truth.py`."""

EVALUATED_FORMATS = ("lvis", "objects365", "coco", *WRITTEN_TRUTH)
"""Formats of a validation source; the json of the first three is evaluated as it is published."""


class Source(Section):
    """One raw data set, as published. Paths are relative to `data.root`."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_]*$")]
    format: Literal[
        "lvis",
        "objects365",
        "imagenet21k",
        "cc3m",
        "cc12m",
        "coco",
        "voc",
        "openimages",
        "visual_genome",
    ]
    images: str
    annotations: str | None = None
    """json (lvis, objects365, coco, visual_genome), csv of boxes (openimages), a split of ImageSets
    (voc), tsv of wnid to category (imagenet21k), tsv of captions (cc3m, cc12m; none with tars)."""
    files: SourceFiles = SourceFiles()
    use_labels: bool = True
    """False drops the class labels that the source has (INet-Unl, O365-Box)."""
    use_class: bool = True
    use_box: bool = True
    use_semantic: bool = True
    """The switches hold for every class, box or semantic term: decoder, encoder, denoising."""
    federated_negatives: Literal["sampled", "verified"] | None = None
    """What the class loss takes as absent from an image: every category of the step's columns that
    its labels do not name (as RichSem does for all sources), or only categories that the source
    verified as absent. Null is `verified` for image-level formats (imagenet21k, cc3m, cc12m), whose
    labels are not exhaustive, and `sampled` for those with boxes, where they can name the whole
    vocabulary. See docs/semantics.md."""
    weight: Positive = 1.0
    """Share of this source among the sources of its stream."""
    keep_flagged: bool = False
    """True keeps boxes that stand for a crowd (coco, objects365), a group (openimages) or something
    difficult (voc) as ordinary boxes; otherwise they are left out and counted."""
    min_instances: PositiveCount | None = None
    """visual_genome: fewest boxes of a category; 30 where it is not given, see docs/data.md."""
    category_map: str | None = None
    """csv of `longtail vocabulary --map`, as reviewed: which category of the detector's vocabulary
    each of this source's is. Without it synsets, names and aliases decide."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        rules, where = FORMATS[self.format], f"source {self.name}: format {self.format}"
        files = {f"files.{key}": value for key, value in self.files.model_dump().items()}
        given = {"annotations": self.annotations, **files}
        for key in rules.needs:
            if given[key] is None:
                raise ValueError(f"{where} needs `{key}`")
        for key in given:
            if given[key] is not None and key not in (*rules.needs, *rules.may):
                usable = [known for known in (*rules.needs, *rules.may) if known in files]
                known = ", ".join(usable) or "none of `files`"
                raise ValueError(f"{where} does not use `{key}` (it uses {known}); leave it out")
        self._refuse_labels_of_captions(where)
        if self.format == "imagenet21k" and self.annotations is None and self.use_labels:
            raise ValueError(f"{where} needs `annotations`, or use_labels: false")
        if self.keep_flagged and not rules.flags:
            flagged = ", ".join(name for name, rule in FORMATS.items() if rule.flags)
            raise ValueError(f"{where} has no flagged boxes for `keep_flagged` ({flagged} have)")
        if self.min_instances is not None and self.format != "visual_genome":
            raise ValueError(f"{where} does not use `min_instances`; visual_genome does")
        return self

    def _refuse_labels_of_captions(self, where: str) -> None:
        """Captions without `files.classes` are unlabelled, unless somebody asked for labels.

        A recipe that is written out whole, as in a checkpoint, states every key and asks for none.
        """
        whole = {"use_box", "use_semantic", "weight"} <= self.model_fields_set
        if self.format not in CAPTION_FORMATS or self.files.classes is not None or whole:
            return
        for key in ("use_labels", "use_class"):
            if key in self.model_fields_set and getattr(self, key):
                raise ValueError(
                    f"{where}: {key} is true, and captions have no labels but the categories of "
                    f"`files.classes` that they name; give that file, or leave {key} out to learn "
                    "from them without labels"
                )

    @property
    def has_labels(self) -> bool:
        """Whether boxes of this source carry a class."""
        captions = self.format in CAPTION_FORMATS
        return self.use_labels and not (captions and self.files.classes is None)

    @property
    def samples_negatives(self) -> bool:
        """Whether what the labels of an image do not name counts as absent from it."""
        if self.federated_negatives is None:
            return self.format not in IMAGE_LEVEL_FORMATS
        return self.federated_negatives == "sampled"


class Transforms(Section):
    """Sizes in pixels. Extra (image-level) samples are cropped and put into 2x2 mosaics."""

    short_sides: list[PositiveCount] = Field(default=list(range(480, 801, 32)), min_length=1)
    max_side: PositiveCount = 1333
    flip_probability: Fraction = 0.5
    crop_probability: Fraction = 0.5
    crop_short_sides: list[PositiveCount] = Field(default=[400, 500, 600], min_length=1)
    crop_sizes: tuple[PositiveCount, PositiveCount] = (384, 600)
    extra_crop_probability: Fraction = 0.5
    """Of extra samples, each before it goes into its mosaic; sizes are those of the other crops."""
    mosaic: bool = True
    mosaic_cell: PositiveCount = 640
    """Half the side of the square mosaic canvas."""
    evaluation_short_side: PositiveCount = 800
    evaluation_max_side: PositiveCount = 1333
    size_divisor: PositiveCount = 32
    canvas_multiple: PositiveCount | None = None
    """Coarser multiple than `size_divisor` for the sides of a padded training batch: fewer distinct
    shapes, so that an allocator's memory stops growing sooner, for more padding."""
    large_scale_jitter: bool = False
    """Instead of `short_sides` and crops: a random scale, then a random part or padding of a
    square (Ghiasi et al. 2021). Mosaics stay as they are."""
    jitter_scales: tuple[Positive, Positive] = (0.1, 2.0)
    """Least and largest longer side, as multiples of `jitter_size`."""
    jitter_size: PositiveCount = 1024
    """Side of the square that every jittered batch fills, padding included."""
    copy_paste_probability: Fraction = 0.0
    """Of a train image getting boxes, with what is in them, of another of its source
    (`copy_paste.py`); 0 turns it off."""
    copy_paste_boxes: PositiveCount = 4
    """Most boxes that are pasted into one image."""
    copy_paste_scales: tuple[Positive, Positive] = (0.5, 1.5)
    """Least and largest size of what is pasted, beside what it was in an image as large."""
    copy_paste_hidden: Fraction = 0.7
    """A box that pasted ones cover over more than this share is left out, and counted."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("jitter_scales", "copy_paste_scales"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} are the least and the largest, and {low} is over {high}")
        if self.canvas_multiple is not None and self.canvas_multiple % self.size_divisor:
            raise ValueError(
                f"canvas_multiple {self.canvas_multiple} is no multiple of size_divisor "
                f"{self.size_divisor}; the detector needs one"
            )
        return self


class ShardReading(Section):
    """How training reads shards that are elsewhere; those on a local disk are read in place."""

    how: Literal["ranges", "shards"] = "ranges"
    """One ranged request for each sample, which needs no disk and moves no byte in vain, or whole
    shards into a cache: fewer requests, and none for what is there from an earlier epoch, but each
    machine fetches every shard."""
    in_flight: PositiveCount = 16
    """Ranged requests that each reader process has on their way."""
    cache: str | None = None
    """Folder of the cache; ~/.cache/longtail/shards by default. Processes and runs share it."""
    cache_gigabytes: Positive = 50.0
    """The shards that were opened least recently are removed beyond it. Two windows of
    `data.shuffle_shards` of each source should fit, or shards are fetched more often."""


class Shards(Section):
    """Raw data and the shards that are made of it: what `longtail prepare` needs to know."""

    root: str
    shards: str | None = None
    """A path or fsspec URL that the tar shards go to; `shards` inside `root` by default."""
    samples_per_shard: PositiveCount = 1000
    bad_sample_budget: Count = 100
    """How many unreadable images one source may have before `prepare` refuses it."""
    store_short_side: PositiveCount | None = None
    """Store images whose short side is larger scaled down to it, with their boxes, to save storage
    and bandwidth; those of the validation source stay as published, since AP is in their pixels."""


class Data(Shards):
    """Raw data, its shards, and how the two streams are mixed."""

    miniature: Literal["tiny", "quickstart", "benchmark"] | None = None
    """Draw this miniature world at `root` when it is not there yet."""
    miniature_seed: Count = 0
    train: list[Source] = Field(min_length=1)
    extra: list[Source] = Field(default=[])
    validation: Source | None = None
    vocabulary: str | None = None
    """Name of the source whose categories the detector learns; the first of `train` by default."""
    sampling: Literal["repeat_factor", "class_aware", "uniform"] = "repeat_factor"
    """Of the train stream: images of rare categories repeated, every category equally often and
    then every image of it (Shen et al. 2016), or each image once an epoch. Extra data are always
    uniform."""
    repeat_threshold: NonNegative = 0.001
    """Of repeat-factor sampling (LVIS paper, appendix); 0 turns it off."""
    extra_mode: Literal["alternate", "mixed"] = "alternate"
    """Whole steps of extra data in turn with whole steps of train data, or both in each batch."""
    extra_ratio: Positive = 1.0
    """Extra images for each train image."""
    max_boxes: PositiveCount = 300
    """Most boxes of a training image, after its crop or in its mosaic; of more, so many are drawn
    each time. It bounds the memory of matching and teacher; 300 is what LVIS judges of an image."""
    shuffle_shards: PositiveCount = 16
    """Shards that are shuffled together. Fewer keep reads sequential and a shard cache small, which
    has to hold so many; more mix better: with 16 of 1000 samples each an image meets the 16,000 of
    its window, and its repeats of an epoch come within it. `benchmarks/plan.py` measures both."""
    aspect_ratio_grouping: bool = False
    """Deal each global batch out in micro-batches of like shapes, with one short side for all of
    its photographs: less padding and ranks of like load, and the same samples and seeds. DINO
    draws the short side for each image, so it is off by default."""
    workers: Count = 2
    """Reader processes of each training worker; 0 reads in line."""
    reading: ShardReading = ShardReading()
    transforms: Transforms = Transforms()

    @property
    def sources(self) -> list[Source]:
        """Every source once: train, extra, validation."""
        last = [self.validation] if self.validation else []
        return [*self.train, *self.extra, *last]

    @property
    def vocabulary_source(self) -> Source:
        """The source whose categories are the detector's columns."""
        name = self.vocabulary or self.train[0].name
        return next(source for source in self.sources if source.name == name)

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [source.name for source in self.sources]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"source names must differ; used more than once: {', '.join(twice)}")
        if self.vocabulary is not None and self.vocabulary not in names:
            close = difflib.get_close_matches(self.vocabulary, names, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"vocabulary {self.vocabulary!r} is none of the sources {names}{hint}")
        if self.validation is not None:
            _check_validation(self.validation, self.vocabulary_source)
        if self.vocabulary_source.format in CAPTION_FORMATS:
            raise ValueError("captions have no categories: take the vocabulary from another source")
        if self.vocabulary_source.annotations is None:
            raise ValueError(
                f"source {self.vocabulary_source.name} has no categories without `annotations`; "
                "take the vocabulary from another source"
            )
        for source in self.sources:
            if source.category_map is None:
                continue
            if source in (self.vocabulary_source, self.validation):
                raise ValueError(
                    f"source {source.name}: `category_map` leads to the detector's categories, "
                    "and this source has them already; leave the key out"
                )
            if not source.has_labels:
                raise ValueError(
                    f"source {source.name}: `category_map` is given, and its labels are not used; "
                    "leave the key out, or set use_labels: true"
                )
        return self


def _check_validation(source: Source, vocabulary: Source) -> None:
    """That a run can be evaluated on a source, with the categories of the `vocabulary` source."""
    where = f"validation: source {source.name}"
    if source.format not in EVALUATED_FORMATS:
        raise ValueError(
            f"{where} has format {source.format}; a run evaluates on "
            f"{', '.join(EVALUATED_FORMATS)}. Others are scored beside it: "
            "`longtail evaluate --annotations GT.json --detections DT.json --protocol ...`"
        )
    if source.format in WRITTEN_TRUTH and not source.use_labels:
        raise ValueError(f"{where} without its labels has no AP; leave out use_labels: false")
    if source.format != "visual_genome" or source == vocabulary:
        return
    if vocabulary.format != "visual_genome":
        raise ValueError(
            f"{where} has free names, of which only those of the detector's categories are "
            f"evaluated, and these are of {vocabulary.name} ({vocabulary.format}); train on "
            "visual_genome, or evaluate on a source with categories of its own"
        )
    if source.min_instances is not None:
        raise ValueError(
            f"{where} has the categories of {vocabulary.name}, however many boxes it has of them; "
            "leave out min_instances"
        )
    if source.files.aliases != vocabulary.files.aliases:
        raise ValueError(
            f"{where} has files.aliases {source.files.aliases!r} and {vocabulary.name} "
            f"{vocabulary.files.aliases!r}; names become categories by one list: give both the same"
        )
