"""`longtail import-checkpoint`: a public detector's weights as a checkpoint of ours."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from pipeline.data.sources.instances import read_categories
from pipeline.data.vocabulary.categories import Vocabulary
from pipeline.detectors import build_detector
from pipeline.detectors.published import Converted, convert, recognise
from pipeline.detectors.published.architecture import infer_section
from pipeline.errors import DataError, StorageError
from pipeline.evaluation.entries import read_json
from pipeline.evaluation.public_file import PublicFile, read_public_file
from pipeline.recipe import DetectorSection, Recipe
from pipeline.semantics.public_text import public_text_embeddings
from pipeline.training.checkpoint import first_manifest, publish_detector
from pipeline.training.manifest import ONE_FILE

SHOWN = 10
TEXT = "text_embeddings"


def import_checkpoint(
    path: Path,
    origin: str,
    output: Path | None = None,
    *,
    annotations: Path | None = None,
    ema: bool = False,
) -> str:
    """Write the detector of a public checkpoint; what was mapped and what was left, as text.

    `origin` is dino, richsem or detrex. `output` is a new folder, as `longtail export` writes it,
    or one .safetensors file; without it, such a file with the checkpoint's name, here.
    `annotations` (LVIS or COCO json) name the columns; without them there are no names, and the
    result can start a training but not detect. Raises `DataError` for what does not fit.
    """
    output = Path(path.name).with_suffix(ONE_FILE) if output is None else output
    if output.exists():
        raise StorageError(f"{output} exists already; name another with -o")
    public = read_public_file(path, ema=ema)
    _check_origin(path, origin, public.state)
    converted = convert(origin, public.state)
    _refuse_unknown(path, origin, public.state, converted)
    section = infer_section(origin, converted.weights, public.arguments)
    vocabulary = Vocabulary([])
    if annotations is not None:
        vocabulary = read_categories(read_json(annotations), str(annotations))
    if origin == "richsem" and annotations is not None:
        converted.weights[TEXT] = public_text_embeddings(
            public.state, vocabulary.names, "cuda" if torch.cuda.is_available() else "cpu"
        )
    weights, columns = _with_columns(converted, section, vocabulary, annotations)
    _check_fit(path, section, weights, converted.names)
    recipe = _recipe(path, origin, section, annotations)
    publish_detector(output, first_manifest(recipe, vocabulary), weights)
    account = _account(public, converted)
    return "\n".join([*account, columns, *_what_next(output, recipe, vocabulary)])


def _check_origin(path: Path, origin: str, names: Iterable[str]) -> None:
    found = recognise(names)
    if found == origin:
        return
    if found is None:
        raise DataError(
            f"{path} is no detector of {origin} nor of another origin that is known: its tensors "
            f"are {_some(sorted(names))}"
        )
    raise DataError(f"{path} is not of {origin}: its names are {found}'s; import it --from {found}")


def _refuse_unknown(
    path: Path, origin: str, state: Mapping[str, Tensor], converted: Converted
) -> None:
    """Every tensor has a place or a reason to be left out, or the file is of another model."""
    left = sorted(state.keys() - set(converted.names.values()) - converted.dropped.keys())
    if left:
        raise DataError(
            f"{path} has {len(left)} tensors that this import from {origin} does not know: "
            f"{_some(left)}. Known are DINO's own modules, on ResNet and Swin; nothing was written"
        )


def _with_columns(
    converted: Converted,
    section: DetectorSection,
    vocabulary: Vocabulary,
    annotations: Path | None,
) -> tuple[dict[str, Tensor], str]:
    """The weights with one column for each category of the vocabulary, and how that came about."""
    weights = dict(converted.weights)
    if section.class_head.kind == "language":
        text = weights.get(TEXT)
        if text is None:
            return weights, "columns: none; RichSem's are text embeddings, which are no weights"
        return weights, f"columns: {len(text)} text embeddings, by the checkpoint's own CLIP"
    head = weights.get("encoder_class_embed.weight")
    count = 0 if head is None else len(head)
    if annotations is None:
        return weights, f"columns: {count}, without names"
    ids = vocabulary.ids
    if count == len(ids):
        return weights, f"columns: {count}, in the order of the category ids"
    if count != max(ids, default=-1) + 1:
        raise DataError(
            f"the model has {count} columns, and {annotations} has {len(ids)} categories with ids "
            f"up to {max(ids, default=-1)}: columns are those of the categories in order, or one "
            "for each id from 0; give the annotations that the model was trained with"
        )
    rows = torch.tensor(ids)
    for name in _per_category(weights):
        weights[name] = weights[name].index_select(0, rows)
    return weights, f"columns: {len(ids)} of {count}, those of the category ids; the rest mean none"


def _per_category(weights: Iterable[str]) -> list[str]:
    pattern = re.compile(r"(encoder_)?class_embed\.(\d+\.)?(weight|bias)|label_embed\.weight")
    return [name for name in weights if pattern.fullmatch(name)]


def _check_fit(
    path: Path, section: DetectorSection, weights: Mapping[str, Tensor], names: Mapping[str, str]
) -> None:
    """Raise `DataError` unless the weights are all those of the detector, in its shapes."""
    wanted = _blank_state(section, weights)
    missing = sorted(wanted.keys() - weights.keys())
    extra = sorted(names.get(name, name) for name in weights.keys() - wanted.keys())
    wrong = [
        f"{names.get(name, name)} {tuple(weights[name].shape)} for {shape}"
        for name, shape in sorted(wanted.items())
        if name in weights and tuple(weights[name].shape) != shape
    ]
    kinds = (("missing", missing), ("left over", extra), ("of another shape", wrong))
    told = [f"{len(some)} {kind}: {_some(some)}" for kind, some in kinds if some]
    if told:
        raise DataError(
            f"{path} does not fit the detector that its shapes promise ({section.backbone.name}, "
            f"{section.encoder_layers} + {section.decoder_layers} layers of "
            f"{section.hidden_dim}): {'; '.join(told)}. Is it the whole state of one model?"
        )


def _blank_state(
    section: DetectorSection, weights: Mapping[str, Tensor]
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the detector's state."""
    text, head = weights.get(TEXT), weights.get("encoder_class_embed.weight")
    count, given = (0 if head is None else len(head)), text
    if section.class_head.kind == "language":
        given = torch.zeros(1, count) if text is None else text
        count = len(given)
    detector = build_detector(
        section, num_categories=max(count, 1), text_embeddings=given, pretrained=False
    )
    shapes = {name: tuple(tensor.shape) for name, tensor in detector.state_dict().items()}
    if text is None:
        shapes.pop(TEXT, None)
    return shapes


def _recipe(path: Path, origin: str, section: DetectorSection, annotations: Path | None) -> Recipe:
    """How the detector is used: as its own code does, one unpadded image at a time.

    The train source stands only for the categories, and the one step for no training;
    `initialize_from` says where the weights are from.
    """
    source = {
        "name": "imported",
        "format": "lvis",
        "images": ".",
        "annotations": "unknown" if annotations is None else annotations.name,
    }
    root = "." if annotations is None else str(annotations.parent)
    tree: dict[str, Any] = {
        "name": re.sub(r"[^A-Za-z0-9_.-]", "_", f"{origin}_{path.stem}"),
        "description": f"weights of {path.name}, from {origin}; data and training say nothing",
        "initialize_from": str(path),
        "data": {"root": root, "train": [source], "transforms": {"size_divisor": 1}},
        "detector": section.model_dump(mode="json"),
        "training": {"steps": 1},
    }
    if origin != "richsem":
        tree["semantic"] = None
    return Recipe.model_validate(tree)


def _account(public: PublicFile, converted: Converted) -> list[str]:
    """What was taken, what it became, what was left out and why."""
    parts = Counter(_part(name) for name in converted.names)
    found = ", ".join(f"{part} {count}" for part, count in parts.items())
    others = f"; not taken: {', '.join(public.others)}" if public.others else ""
    lines = [
        f"read: {len(public.state):,} tensors of {public.part}{others}",
        f"mapped: {len(converted.names):,} ({found})",
    ]
    if not public.arguments:
        lines.append("assumed: 4 sampling points a head, for the file has no training arguments")
    reasons: dict[str, list[str]] = {}
    for name, reason in converted.dropped.items():
        # Where it stands for one of many, its name is in the list.
        reasons.setdefault(reason.partition(" as ")[0], []).append(name)
    for reason, names in reasons.items():
        lines.append(f"left out: {len(names):,}, {reason}: {_some(sorted(names))}")
    return lines if reasons else [*lines, "left out: nothing"]


def _part(name: str) -> str:
    first = name.split(".")[0]
    return "heads" if first.endswith(("class_embed", "bbox_embed")) else first


def _what_next(output: Path, recipe: Recipe, vocabulary: Vocabulary) -> list[str]:
    start = f"a recipe with this detector section starts from it by `initialize_from: {output}`"
    if not vocabulary.num_categories:
        use = f"{output} has no category names (--annotations gives them): {start}"
    else:
        use = (
            f"{output}: `longtail predict {output} IMAGE`, `longtail export {output} -o DIR`, "
            f"`longtail evaluate RECIPE --checkpoint {output}`; {start}"
        )
    detector = yaml.safe_dump({"detector": _stated(recipe.detector)}, sort_keys=False, width=100)
    return [use, detector.rstrip()]


def _stated(section: DetectorSection) -> dict[str, Any]:
    """What a recipe has to state of the section: what is not the default."""
    return section.model_dump(mode="json", exclude_defaults=True)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
