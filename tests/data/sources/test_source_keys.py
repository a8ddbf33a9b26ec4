"""Which keys of a source each format needs, may have and refuses; which formats a run evaluates."""

import pytest
from pydantic import ValidationError
from raw_data import LVIS

from pipeline.recipe import Data, Source

GIVEN = {
    "lvis": {"annotations": "a.json"},
    "coco": {"annotations": "a.json"},
    "objects365": {"annotations": "a.json"},
    "voc": {"annotations": "train.txt"},
    "openimages": {"annotations": "boxes.csv", "files": {"classes": "classes.csv"}},
    "visual_genome": {"annotations": "a.json", "files": {"image_data": "image_data.json"}},
}


def source(form: str, **changes: object) -> Source:
    tree = {"name": "some", "format": form, "images": "images", **GIVEN[form], **changes}
    return Source.model_validate(tree)


@pytest.mark.parametrize("form", GIVEN)
def test_each_format_needs_its_annotations(form: str) -> None:
    assert source(form).format == form
    with pytest.raises(ValidationError, match=f"source some: format {form} needs `annotations`"):
        source(form, annotations=None)


@pytest.mark.parametrize(
    ("form", "key"), [("openimages", "files.classes"), ("visual_genome", "files.image_data")]
)
def test_some_need_further_files(form: str, key: str) -> None:
    with pytest.raises(ValidationError, match=f"format {form} needs `{key}`"):
        source(form, files={})


@pytest.mark.parametrize(
    ("form", "files", "used"),
    [
        ("coco", {"classes": "c.csv"}, "none of `files`"),
        ("lvis", {"hierarchy": "h.json"}, "none of `files`"),
        ("voc", {"image_data": "i.json"}, "none of `files`"),
        (
            "openimages",
            {"classes": "c.csv", "aliases": "a.txt"},
            "files.classes, files.image_labels, files.hierarchy",
        ),
        ("visual_genome", {"image_data": "i", "classes": "c"}, "files.image_data, files.aliases"),
    ],
)
def test_files_that_a_format_does_not_use_are_refused(
    form: str, files: dict[str, str], used: str
) -> None:
    with pytest.raises(ValidationError, match=f"format {form} does not use `files.*it uses {used}"):
        source(form, files=files)


@pytest.mark.parametrize("form", GIVEN)
def test_flagged_boxes_are_kept_only_where_there_are_flags(form: str) -> None:
    if form in ("lvis", "visual_genome"):
        with pytest.raises(ValidationError, match=f"format {form} has no flagged boxes"):
            source(form, keep_flagged=True)
    else:
        assert source(form, keep_flagged=True).keep_flagged


def test_only_visual_genome_has_a_frequency_cut() -> None:
    assert source("visual_genome", min_instances=7).min_instances == 7
    with pytest.raises(ValidationError, match="format coco does not use `min_instances`"):
        source("coco", min_instances=7)


@pytest.mark.parametrize("form", GIVEN)
def test_a_run_evaluates_on_all_but_voc(form: str) -> None:
    train = [source(form, name="other")]
    tree = {"root": "r", "train": train, "validation": source(form)}
    if form != "voc":
        assert Data.model_validate(tree).validation == source(form)
        return
    with pytest.raises(ValidationError, match=rf"format {form}; .*longtail evaluate --annotations"):
        Data.model_validate(tree)


ALIASES = {"image_data": "image_data.json", "aliases": "aliases.txt"}


@pytest.mark.parametrize(
    ("train", "validation", "message"),
    [
        (
            LVIS,
            source("visual_genome"),
            r"these are of lvis_train \(lvis\); train on visual_genome",
        ),
        (
            source("visual_genome", name="vg"),
            source("visual_genome", min_instances=5),
            "has the categories of vg, .* leave out min_instances",
        ),
        (
            source("visual_genome", name="vg", files=ALIASES),
            source("visual_genome"),
            "files.aliases None and vg 'aliases.txt'; .* give both the same",
        ),
        (LVIS, source("openimages", use_labels=False), "without its labels has no AP"),
        (
            source("visual_genome", name="vg"),
            source("visual_genome", use_labels=False),
            "without its labels has no AP",
        ),
    ],
)
def test_a_validation_source_that_cannot_be_evaluated_is_refused(
    train: Source, validation: Source, message: str
) -> None:
    tree = {"root": "r", "train": [train], "validation": validation}
    with pytest.raises(ValidationError, match=message):
        Data.model_validate(tree)
