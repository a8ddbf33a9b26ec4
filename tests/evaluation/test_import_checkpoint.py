"""Public checkpoints become ours: what is written, said and refused, and that it is of use."""

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from public_checkpoints import (
    CATEGORIES,
    COCO_IDS,
    ORIGINS,
    public_state,
    save,
    training_arguments,
)
from safetensors.torch import save_file
from torch import Tensor

from pipeline.data.vocabulary.categories import Vocabulary
from pipeline.detectors.published import convert
from pipeline.detectors.published.architecture import infer_section
from pipeline.errors import DataError, RecipeError, StorageError
from pipeline.evaluation import import_checkpoint as module
from pipeline.evaluation.import_checkpoint import import_checkpoint
from pipeline.evaluation.predict import load_detector
from pipeline.training.checkpoint import export_detector, load_weights
from pipeline.training.locate import locate_checkpoint
from pipeline.training.manifest import read_manifest


@pytest.fixture(scope="module")
def states() -> dict[str, dict[str, Tensor]]:
    return {origin: public_state(origin) for origin in ORIGINS}


def annotations(folder: Path, ids: Sequence[int]) -> Path:
    path = folder / "annotations.json"
    categories = [{"id": number, "name": f"thing {number}"} for number in reversed(ids)]
    path.write_text(json.dumps({"categories": categories, "images": [], "annotations": []}))
    return path


def from_public(
    folder: Path,
    state: dict[str, Tensor],
    origin: str,
    output: str = "imported",
    ids: Sequence[int] = range(CATEGORIES),
) -> Path:
    """Import with names for the columns."""
    path = save(folder, state, args=training_arguments(**CHANGES.get(origin, {})))
    named = annotations(folder, ids)
    import_checkpoint(path, origin, folder / output, annotations=named)
    return folder / output


CHANGES: dict[str, dict[str, Any]] = {"detrex": {"enc_n_points": 4, "dec_n_points": 4}}


@pytest.fixture
def text(monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Text embeddings in the place of those that CLIP's text tower gives."""
    rows = torch.randn(CATEGORIES, 48, generator=torch.Generator().manual_seed(9))
    monkeypatch.setattr(module, "public_text_embeddings", lambda state, names, device: rows)
    return rows


@pytest.mark.parametrize("form", ["folder", "file"])
@pytest.mark.parametrize("origin", ORIGINS)
def test_what_is_imported_predicts_and_exports(
    tmp_path: Path, states: dict[str, dict[str, Tensor]], text: Tensor, origin: str, form: str
) -> None:
    name = "imported" if form == "folder" else "imported.safetensors"
    output = from_public(tmp_path, states[origin], origin, name)
    weights = load_weights(output, ema=True)
    for name, tensor in convert(origin, states[origin]).weights.items():
        assert torch.equal(weights[name], tensor), name
    loaded = load_detector(output)
    assert loaded.vocabulary.names == [f"thing {number}" for number in range(CATEGORIES)]
    section = loaded.recipe.detector
    assert (section.hidden_dim, section.num_heads, section.num_queries) == (32, 4, 20)
    assert section.backbone.name == "resnet18" and section.decoder_layers == 3
    (found,) = loaded.predict([Image.new("RGB", (80, 60), (90, 20, 200))], top_k=7)
    assert len(found.score) == 7
    again = export_detector(locate_checkpoint(output), tmp_path / "again")
    assert load_weights(again, ema=True).keys() == weights.keys()
    assert read_manifest(again).vocabulary == read_manifest(output).vocabulary


def test_the_section_says_how_each_origin_differs(
    tmp_path: Path, states: dict[str, dict[str, Tensor]], text: Tensor
) -> None:
    sections = {}
    for origin in ORIGINS:
        folder = tmp_path / origin
        folder.mkdir()
        output = from_public(folder, states[origin], origin)
        sections[origin] = load_detector(output).recipe.detector
    dino, richsem, detrex = (sections[origin] for origin in ORIGINS)
    assert dino.shared_heads and richsem.shared_heads and not detrex.shared_heads
    assert (dino.position_temperature, detrex.position_temperature) == (20.0, 10000.0)
    assert (dino.position_offset, detrex.position_offset) == (0.0, -0.5)
    assert (dino.num_points, detrex.num_points) == (2, 4)
    assert richsem.class_head.kind == "language" and not richsem.class_head.bias
    assert dino.class_head.kind == detrex.class_head.kind == "linear"
    assert dino.denoising.num_queries == 12
    frozen = [section.backbone.frozen_stages for section in (dino, richsem, detrex)]
    assert frozen == [2, 2, 1]


@pytest.mark.parametrize(
    ("given", "categories"),
    [({}, 50), ({"fed_num_sample_cats": 20}, 20), ({"use_fed_loss": False}, 0)],
)
def test_federated_columns_are_those_of_the_training(
    states: dict[str, dict[str, Tensor]], given: dict[str, Any], categories: int
) -> None:
    weights = convert("richsem", states["richsem"]).weights
    arguments = vars(training_arguments(**given))
    assert infer_section("richsem", weights, arguments).losses.federated_categories == categories


def test_columns_by_category_id_become_those_of_the_categories(
    tmp_path: Path, states: dict[str, dict[str, Tensor]]
) -> None:
    """DINO's COCO models have a column for each id up to 90, eleven of which mean nothing."""
    state = states["dino"]
    output = from_public(tmp_path, state, "dino", ids=COCO_IDS)
    weights = load_weights(output, ema=True)
    rows = torch.tensor(COCO_IDS)
    for ours, theirs in (
        ("class_embed.weight", "class_embed.0.weight"),
        ("class_embed.bias", "class_embed.0.bias"),
        ("encoder_class_embed.weight", "transformer.enc_out_class_embed.weight"),
        ("label_embed.weight", "label_enc.weight"),
    ):
        assert torch.equal(weights[ours], state[theirs][rows])
    assert Vocabulary.from_json(read_manifest(output).vocabulary).ids == COCO_IDS
    load_detector(output)


def test_another_number_of_categories_is_refused(
    tmp_path: Path, states: dict[str, dict[str, Tensor]]
) -> None:
    with pytest.raises(DataError, match=r"12 columns, and .* has 5 categories with ids up to 4"):
        from_public(tmp_path, states["dino"], "dino", ids=range(5))


def test_without_annotations_weights_are_written_that_cannot_detect(
    tmp_path: Path,
    states: dict[str, dict[str, Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for origin in ORIGINS:
        path = save(tmp_path, states[origin], args=training_arguments(**CHANGES.get(origin, {})))
        told = import_checkpoint(path, origin)
        assert "no category names (--annotations gives them)" in told
        output = tmp_path / "checkpoint.safetensors"
        with pytest.raises(RecipeError, match="no category names"):
            load_detector(output)
        assert "class_embed.0.weight" in load_weights(output, True) or origin != "detrex"
        output.unlink()


def test_it_says_what_it_took_and_what_it_left(
    tmp_path: Path, states: dict[str, dict[str, Tensor]], text: Tensor
) -> None:
    state = states["richsem"]
    averages = {f"module.{name}": tensor + 1 for name, tensor in state.items()}
    path = save(tmp_path, state, ema_model=averages, args=training_arguments())
    options = {"annotations": annotations(tmp_path, range(CATEGORIES))}
    told = import_checkpoint(path, "richsem", tmp_path / "plain", **options)
    count = len(convert("richsem", state).names)
    backbone = sum(name.startswith("backbone.") for name in state)
    assert f"read: {len(state):,} tensors of model; not taken: ema_model" in told
    assert f"mapped: {count} (" in told and f"backbone {backbone}" in told
    assert "left out: 6, a copy of CLIP, which is the teacher's: class_embed.clip." in told
    told = import_checkpoint(path, "richsem", tmp_path / "averaged", ema=True, **options)
    assert "tensors of ema_model; not taken: model" in told
    plain, averaged = (load_weights(tmp_path / name, True) for name in ("plain", "averaged"))
    name = "decoder.norm.weight"
    assert torch.equal(averaged[name], plain[name] + 1)


def test_averaged_weights_that_are_not_there_are_refused(
    tmp_path: Path, states: dict[str, dict[str, Tensor]]
) -> None:
    with pytest.raises(DataError, match=r"no averaged weights .*--ema .*model, epoch"):
        import_checkpoint(save(tmp_path, states["dino"]), "dino", tmp_path / "x", ema=True)


@pytest.mark.parametrize("origin", ORIGINS)
def test_another_origin_is_named(
    tmp_path: Path, states: dict[str, dict[str, Tensor]], origin: str
) -> None:
    other = ORIGINS[(ORIGINS.index(origin) + 1) % 3]
    with pytest.raises(DataError, match=f"not of {other}: .* import it --from {origin}"):
        import_checkpoint(save(tmp_path, states[origin]), other, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_what_no_origin_wrote_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, {"fc.weight": torch.zeros(2, 2)})
    with pytest.raises(DataError, match=r"no detector of dino nor of another .* fc\.weight"):
        import_checkpoint(path, "dino", tmp_path / "x")


def test_missing_tensors_are_named(tmp_path: Path, states: dict[str, dict[str, Tensor]]) -> None:
    state = {k: v for k, v in states["dino"].items() if "decoder.layers.1.norm" not in k}
    with pytest.raises(DataError, match=r"6 missing: decoder\.layers\.1\.cross_attn_norm\.bias"):
        from_public(tmp_path, state, "dino")
    assert not (tmp_path / "imported").exists()


def test_other_shapes_are_named(tmp_path: Path, states: dict[str, dict[str, Tensor]]) -> None:
    name = "transformer.encoder.layers.1.attentions.0.value_proj.weight"
    state = states["detrex"] | {name: torch.zeros(32, 30)}
    with pytest.raises(DataError, match=rf"1 of another shape: {name} \(32, 30\) for \(32, 32\)"):
        from_public(tmp_path, state, "detrex")


def test_unknown_tensors_are_named(tmp_path: Path, states: dict[str, dict[str, Tensor]]) -> None:
    more = {f"mask_head.{number}.weight": torch.zeros(1) for number in range(12)}
    with pytest.raises(DataError, match=r"12 tensors .* mask_head\.0\.weight.* and 2 more"):
        from_public(tmp_path, states["detrex"] | more, "detrex")


def test_another_backbone_is_refused(tmp_path: Path, states: dict[str, dict[str, Tensor]]) -> None:
    state = {k: v for k, v in states["dino"].items() if "layer3.1." not in k}
    with pytest.raises(DataError, match=r"basic \[2, 2, 1, 2\].*resnet50"):
        from_public(tmp_path, state, "dino")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dilation": True}, "dilation True"),
        ({"dec_n_points": 8}, "dec_n_points 8"),
        ({"transformer_activation": "gelu"}, "transformer_activation 'gelu'.*'relu'"),
        ({"decoder_module_seq": ["ca", "sa", "ffn"]}, "decoder_module_seq"),
        ({"pe_temperatureH": 20, "pe_temperatureW": 40}, "pe_temperatureW 40.*only 20"),
        ({"use_detached_boxes_dec_out": True}, "use_detached_boxes_dec_out True"),
        ({"nheads": "four"}, "nheads 'four'"),
    ],
)
def test_options_that_we_do_not_have_are_refused(
    tmp_path: Path, states: dict[str, dict[str, Tensor]], change: dict[str, Any], words: str
) -> None:
    path = save(tmp_path, states["dino"], args=training_arguments(**change))
    with pytest.raises(DataError, match=words):
        import_checkpoint(path, "dino", tmp_path / "x")


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def test_nothing_in_a_file_is_executed(
    tmp_path: Path, states: dict[str, dict[str, Tensor]]
) -> None:
    target = tmp_path / "exploded"
    path = save(tmp_path, states["dino"], args=Bomb(target))
    with pytest.raises(DataError, match="not executed to read it"):
        import_checkpoint(path, "dino", tmp_path / "x")
    plain = tmp_path / "R-50.pkl"
    plain.write_bytes(pickle.dumps({"model": {}, "bomb": Bomb(target)}))
    with pytest.raises(DataError, match="a pickle, which runs code"):
        import_checkpoint(plain, "detrex", tmp_path / "x")
    plain.rename(tmp_path / "renamed.pth")
    with pytest.raises(DataError, match="not executed to read it"):
        import_checkpoint(tmp_path / "renamed.pth", "detrex", tmp_path / "x")
    assert not target.exists()
    pickle.loads(pickle.dumps(Bomb(target)))
    assert target.exists(), "it would have exploded"


def test_damaged_absent_and_occupied_paths_are_named(
    tmp_path: Path, states: dict[str, dict[str, Tensor]]
) -> None:
    path = save(tmp_path, states["dino"])
    (tmp_path / "there").mkdir()
    with pytest.raises(StorageError, match="exists already"):
        import_checkpoint(path, "dino", tmp_path / "there")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(StorageError, match="cannot be read"):
        import_checkpoint(path, "dino", tmp_path / "x")
    with pytest.raises(RecipeError, match="is no file"):
        import_checkpoint(tmp_path / "absent.pth", "dino", tmp_path / "x")
    for content in (b"hello", b""):
        path.write_bytes(content)
        with pytest.raises(
            StorageError, match=r"nothing that torch\.save has written \(\w+Error: "
        ):
            import_checkpoint(path, "dino", tmp_path / "x")
    torch.save({"epoch": 3}, path)
    with pytest.raises(DataError, match=r"no model's state.* epoch"):
        import_checkpoint(path, "dino", tmp_path / "x")


def test_a_damaged_or_foreign_single_file_is_refused(
    tmp_path: Path, states: dict[str, dict[str, Tensor]]
) -> None:
    output = from_public(tmp_path, states["dino"], "dino", "detector.safetensors")
    foreign = tmp_path / "foreign.safetensors"
    save_file({"a": torch.zeros(1)}, foreign)
    with pytest.raises(StorageError, match=r"tensors without a manifest.*import-checkpoint"):
        load_detector(foreign)
    output.write_bytes(output.read_bytes()[:-100])
    with pytest.raises(StorageError, match=r"detector\.safetensors could not be read"):
        load_detector(output)


def test_a_bare_state_dict_is_taken_too(
    tmp_path: Path, states: dict[str, dict[str, Tensor]]
) -> None:
    path = tmp_path / "bare.pth"
    torch.save({f"module.{name}": tensor for name, tensor in states["detrex"].items()}, path)
    told = import_checkpoint(path, "detrex", tmp_path / "out")
    assert f"read: {len(states['detrex'])} tensors of the file's own tensors" in told
    assert "assumed: 4 sampling points a head" in told
