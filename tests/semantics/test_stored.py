"""Stored soft labels: those of the teacher, found by box through every augmentation."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from threading import Event

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_world import metrics, prepare_here, run_command, tiny_recipe, write_recipe

from pipeline.data.images import decode_pixels
from pipeline.data.shards.preparing import load_index, shards_url
from pipeline.data.stream.batches import Stream, source_readers
from pipeline.data.stream.reader import EvaluationReader, SourceReader
from pipeline.errors import DataError, RecipeError, StorageError
from pipeline.recipe import Recipe, Teacher
from pipeline.semantics.clip import new_clip
from pipeline.semantics.sparse import SparseLabels
from pipeline.semantics.stored import (
    HEADER,
    StoredSource,
    file_url,
    labels_identity,
    labels_url,
    read_labels,
    write_labels,
)
from pipeline.semantics.storing import finish, missing_shards, store_shard
from pipeline.store_labels import store_soft_labels
from pipeline.training.build import (
    build_teacher,
    labelled_sources,
    labels_folder,
    stored_labels,
)
from pipeline.training.loop import train_here

TRANSFORMS = {
    "short_sides": [64, 72],
    "max_side": 96,
    "crop_short_sides": [64],
    "crop_sizes": [40, 64],
    "mosaic_cell": 48,
    "evaluation_short_side": 64,
    "evaluation_max_side": 96,
}
AUGMENTED = {"max_boxes": 6, "transforms": TRANSFORMS | {"copy_paste_probability": 0.8}}


@pytest.fixture(scope="module")
def folder(module_path: Path) -> Path:
    prepare_here(module_path)
    return module_path


def recipe_of(folder: Path, name: str, top_k: int | None = None, **transforms: object) -> Recipe:
    return tiny_recipe(
        folder,
        name,
        teacher={"stored": True, "top_k": top_k},
        data={"transforms": TRANSFORMS | transforms},
    )


def readers_of(recipe: Recipe) -> dict[str, SourceReader]:
    used = [*recipe.data.train, *recipe.data.extra]
    indexes = {source.name: load_index(shards_url(recipe.data, source)) for source in used}
    vocabulary = indexes[recipe.data.vocabulary_source.name].vocabulary
    return source_readers(used, indexes, vocabulary, recipe.data.root)


def store(recipe: Recipe) -> dict[str, str]:
    """The labels of every source, made in this process; their folders."""
    index = load_index(shards_url(recipe.data, recipe.data.vocabulary_source))
    teacher, folders = build_teacher(recipe, index.vocabulary, "cpu"), {}
    for name, reader in readers_of(recipe).items():
        folder, identity = labels_folder(recipe, index.vocabulary, reader.index)
        for shard in missing_shards(reader.index, folder):
            store_shard(
                reader,
                teacher,
                recipe.data.transforms,
                shard,
                folder,
                recipe.teacher.top_k,
                "cpu",
            )
        finish(reader.index, folder, identity, teacher.temperature)
        folders[name] = folder
    return folders


@pytest.fixture(scope="module")
def exact(folder: Path) -> Recipe:
    recipe = recipe_of(folder, "exact")
    store(recipe)
    return recipe


def stream_of(recipe: Recipe, sources: dict[str, SourceReader]) -> Stream:
    indexes = {name: reader.index for name, reader in sources.items()}
    vocabulary = indexes[recipe.data.vocabulary_source.name].vocabulary
    return Stream(recipe.data, recipe.training, indexes, vocabulary, seed=recipe.seed)


def test_rows_are_written_and_read_as_they_are(tmp_path: Path) -> None:
    rows = torch.randn(5, 30, generator=torch.Generator().manual_seed(0)).softmax(dim=1)
    for top_k in (None, 4):
        sparse = SparseLabels.of(rows, top_k)
        write_labels(str(tmp_path / "a.safetensors"), [2, 0, 3], sparse, skipped=1)
        found, skipped = read_labels(str(tmp_path / "a.safetensors"))
        assert skipped == 1 and torch.equal(found.dense("cpu"), sparse.dense("cpu"))
    (tmp_path / "a.safetensors").write_bytes(b"12345678")
    with pytest.raises(StorageError, match="make what is missing again"):
        read_labels(str(tmp_path / "a.safetensors"))


def test_the_same_rows_are_the_same_bytes(tmp_path: Path) -> None:
    """Even of one process: safetensors draws the order of its metadata's entries anew each time."""
    sparse = SparseLabels.of(torch.eye(4), 2)
    for name in range(12):
        write_labels(str(tmp_path / f"{name}.safetensors"), [4], sparse, skipped=1)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


@pytest.mark.parametrize("top_k", [None, 3])
def test_they_are_the_teachers_of_the_image_as_it_is(
    exact: Recipe, folder: Path, top_k: int | None
) -> None:
    recipe = exact if top_k is None else recipe_of(folder, "sparse", top_k)
    folders = store(recipe)
    vocabulary = load_index(shards_url(recipe.data, recipe.data.vocabulary_source)).vocabulary
    teacher = build_teacher(recipe, vocabulary, "cpu")
    seen = set()
    for name, reader in readers_of(recipe).items():
        source = StoredSource(reader.index, folders[name])
        assert source.header.num_boxes == reader.index.num_boxes and source.header.skipped == 0
        for number in range(0, reader.index.num_samples, 7):
            sample = reader.shards.sample(number)
            batch = EvaluationReader(reader, recipe.data.transforms).read([number]).batch
            assert batch is not None and len(batch.targets[0].boxes) == len(sample.boxes)
            [labels] = teacher.soft_labels(batch)
            expected = SparseLabels.of(labels, top_k).dense("cpu")
            boxes = np.stack([np.full(len(labels), number), np.arange(len(labels))], axis=1)
            found = source.rows(boxes).dense("cpu")
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
            seen.update(tuple(row) for row in found.tolist())
    assert len(seen) > 20, "labels differ from box to box"


def test_boxes_keep_their_origin_through_every_augmentation(folder: Path) -> None:
    """Said by their category: a wrong origin would name a box of another one sooner or later."""
    recipe = tiny_recipe(folder, "augmented", data=AUGMENTED)
    sources = readers_of(recipe)
    counts = {"boxes": 0, "foreign": 0, "crowded": 0}
    for batches in stream_of(recipe, sources).iterate(0, 40):
        for batch in batches.micro_batches:
            for name, target in zip(batch.source, batch.targets, strict=True):
                assert target.origin is not None and target.origin.shape == (len(target.boxes), 2)
                assert len(np.unique(target.origin, axis=0)) >= min(len(target.origin), 1)
                counts["boxes"] += len(target.boxes)
                counts["foreign"] += len(np.unique(target.origin[:, 0])) > 1
                counts["crowded"] += len(target.boxes) == recipe.data.max_boxes
                for (sample, box), label in zip(target.origin, target.labels, strict=True):
                    ids = sources[name].shards.sample(int(sample)).category_ids
                    assert sources[name].columns(ids)[box] == label
    assert counts["boxes"] > 200 and counts["foreign"] > 5 and counts["crowded"] > 0


def test_a_batch_gets_the_rows_of_its_boxes(exact: Recipe) -> None:
    sources = readers_of(exact)
    vocabulary = load_index(shards_url(exact.data, exact.data.vocabulary_source)).vocabulary
    labels = stored_labels(exact, vocabulary)
    assert labels.batches_ahead == 0
    folders = {
        name: labels_folder(exact, vocabulary, index)[0]
        for name, index in labelled_sources(exact).items()
    }
    for batches in stream_of(exact, sources).iterate(0, 6):
        for batch in batches.micro_batches:
            labels.ask(batch)
            found = labels.labels(batch)
            for name, target, rows in zip(batch.source, batch.targets, found, strict=True):
                assert rows.shape == (len(target.boxes), vocabulary.num_categories)
                for (sample, box), row in zip(target.origin.tolist(), rows, strict=True):
                    index = sources[name].index
                    whole, _ = read_labels(file_url(folders[name], int(index.shard[sample])))
                    first = int(np.searchsorted(index.shard, index.shard[sample]))
                    place = index.category_offsets[sample] - index.category_offsets[first] + box
                    assert row.tolist() == whole.values[place].tolist()


def test_what_is_missing_or_foreign_is_refused_before_training(exact: Recipe, folder: Path) -> None:
    with pytest.raises(StorageError, match=r"no soft labels of this teacher.*there are others"):
        train_here(recipe_of(folder, "other", top_k=5))
    larger = recipe_of(folder, "larger", evaluation_short_side=80)
    with pytest.raises(StorageError, match=r"--soft-labels.*teacher.stored to false"):
        train_here(larger)
    vocabulary = load_index(shards_url(exact.data, exact.data.vocabulary_source)).vocabulary
    index = next(iter(labelled_sources(exact).values()))
    place, _ = labels_folder(exact, vocabulary, index)
    source = StoredSource(index, place)
    with pytest.raises(StorageError, match="no soft label for box 10000 of sample 0"):
        source.rows(np.array([[0, 10000]]))
    with pytest.raises(RecipeError, match="is a URL"):
        StoredSource(index, "s3://bucket/soft_labels_1")


def test_images_that_could_not_be_read_then_get_substitutes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The labels were made where two images could not be decoded, and here they can."""
    recipe = recipe_of(folder, "skipped", top_k=7)
    sources = readers_of(recipe)
    reader = sources["lvis_train"]
    with_boxes = np.flatnonzero(np.diff(reader.index.category_offsets))
    samples = {int(i): reader.shards.sample(int(i)) for i in with_boxes[:2]}
    damaged = {sample.image for sample in samples.values()}

    def decode(data: bytes) -> np.ndarray:
        if data in damaged:
            raise DataError("damaged")
        return decode_pixels(data)

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.data.stream.reader.decode_pixels", decode)
        store(recipe)
    labels = stored_labels(recipe, reader.index.vocabulary)
    assert labels.unlabelled() == {"lvis_train": set(samples), "imagenet": set()}
    stream = stream_of(recipe, sources)
    stream.leave_out(labels.unlabelled())
    for batches in stream.iterate(0, 40):
        for batch in batches.micro_batches:
            for rows in labels.labels(batch):
                assert torch.isfinite(rows).all()
    met = stream.ledger.unreadable
    assert met.keys() == {f"lvis_train/{sample.key}" for sample in samples.values()}
    assert all("no soft labels" in reason for reason in met.values())

    data = {"transforms": TRANSFORMS, "bad_sample_budget": 1}
    strict = tiny_recipe(folder, "strict", teacher={"stored": True, "top_k": 7}, data=data)
    with pytest.raises(DataError, match=r"lvis_train: 2 images could not.*bad_sample_budget 1"):
        train_here(strict)
    assert not metrics(strict)


def test_a_recipe_whose_branch_no_source_teaches_is_refused(exact: Recipe, folder: Path) -> None:
    tree = exact.model_dump()
    for source in (*tree["data"]["train"], *tree["data"]["extra"]):
        source["use_semantic"] = False
    recipe = Recipe.model_validate(tree)
    vocabulary = load_index(shards_url(recipe.data, recipe.data.vocabulary_source)).vocabulary
    with pytest.raises(RecipeError, match=r"no source has use_semantic.*semantic to null"):
        stored_labels(recipe, vocabulary)
    with pytest.raises(RecipeError, match="no source has use_semantic"):
        store_soft_labels(recipe, Event())


def test_labels_are_found_by_all_that_they_follow_from(exact: Recipe, tmp_path: Path) -> None:
    index = next(iter(labelled_sources(exact).values()))
    torch.manual_seed(0)
    weights = tmp_path / "weights.safetensors"
    save_file(new_clip("miniature-rn").state_dict(), weights)
    rows = np.random.default_rng(0).normal(size=(2, 64)).astype(np.float32)
    np.save(tmp_path / "rows.npy", rows)
    other_weights = tmp_path / "other.safetensors"
    other_weights.write_bytes(weights.read_bytes() + b" ")

    def url(names: Sequence[str] = ("dog", "cat"), **changes: object) -> str:
        teacher = {"model": "miniature-rn", "pretrained": str(weights)}
        sizes = {key: changes.pop(key) for key in ("evaluation_short_side",) if key in changes}
        section = Teacher.model_validate(teacher | changes)
        transforms = exact.data.transforms.model_copy(update=sizes)
        return labels_url(index, labels_identity(section, None, names, transforms, index))

    plain = url()
    others = [
        url(("cat", "dog")),
        url(pretrained=str(other_weights)),
        url(prompts="single"),
        url(regions="crops"),
        url(image_scale=2.0),
        url(top_k=1),
        url(evaluation_short_side=65),
        url(text_embeddings=str(tmp_path / "rows.npy")),
    ]
    np.save(tmp_path / "rows.npy", -rows)
    others.append(url(text_embeddings=str(tmp_path / "rows.npy")))
    assert len({plain, *others}) == 10
    # What `auto` chooses is the same as what is named; who makes the labels does not matter.
    assert url(regions="dense") == url(placement="pool", actors=3) == plain


def test_nobody_learns_from_a_source_without_semantic_weight(exact: Recipe) -> None:
    vocabulary = load_index(shards_url(exact.data, exact.data.vocabulary_source)).vocabulary
    labels = stored_labels(exact, vocabulary)
    sources = readers_of(exact)
    [step] = stream_of(exact, sources).iterate(0, 1)
    batch = replace(step.micro_batches[0], source=["other"] * 2)
    for rows in labels.labels(batch):
        assert torch.allclose(rows, torch.full_like(rows, 1 / vocabulary.num_categories))


@pytest.mark.slow
def test_a_run_from_stored_labels_learns_and_holds_no_teacher(
    exact: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_teacher(*_: object) -> None:
        raise AssertionError("no teacher is loaded")

    monkeypatch.setattr("pipeline.training.build.build_teacher", no_teacher)
    train_here(exact)
    lines = metrics(exact)
    assert len(lines) == 8 and all(line["loss/semantic"] >= 0 for line in lines)
    assert any(line["loss/semantic"] > 0 for line in lines)


@pytest.mark.slow
def test_prepare_makes_them_and_goes_on_where_it_was(folder: Path) -> None:
    recipe = recipe_of(folder, "prepared", top_k=2)
    words = ["-m", "pipeline", "prepare", str(write_recipe(folder, recipe)), "--soft-labels"]
    done = run_command(*words, seconds=400)
    assert done.returncode == 0, done.stderr
    assert "the 2 largest of 12, with" in done.stdout
    vocabulary = load_index(shards_url(recipe.data, recipe.data.vocabulary_source)).vocabulary
    stored_labels(recipe, vocabulary)
    index = labelled_sources(recipe)["lvis_train"]
    place = Path(labels_folder(recipe, vocabulary, index)[0])
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    lost = sorted(place.glob("*.safetensors"))[-1]
    kept = sorted(place.glob("*.safetensors"))[0].stat().st_mtime_ns
    lost.unlink()
    (place / HEADER).unlink()
    again = run_command(*words, seconds=400)
    assert again.returncode == 0, again.stderr
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before
    assert sorted(place.glob("*.safetensors"))[0].stat().st_mtime_ns == kept
    plain = write_recipe(folder, tiny_recipe(folder, "plain", semantic=None))
    refused = run_command("-m", "pipeline", "prepare", str(plain), "--soft-labels", seconds=400)
    assert refused.returncode == 78 and "learns no soft labels" in refused.stderr
