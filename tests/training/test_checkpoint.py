"""Checkpoints: whole or not there, at any stage and world size, and never another model's."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from test_engine import BATCH, MICRO, section, toy_student, train_step
from torch import nn
from toy_student import LAYOUTS, ToyDetector, run_ranks

from pipeline.data.vocabulary.categories import Category, Vocabulary
from pipeline.errors import RecipeError, StorageError
from pipeline.recipe import Recipe
from pipeline.training.checkpoint import (
    Progress,
    State,
    export_detector,
    load_state,
    load_weights,
    restore,
    save,
)
from pipeline.training.engine import Engine, init_process_group, num_micro_batches
from pipeline.training.locate import locate_checkpoint
from pipeline.training.manifest import (
    checkpoint_dir,
    newest_verified,
    refuse_another_recipe,
    verify,
)

NAMES = ["cat", "dog", "aerosol_can", "bow_(weapon)", "cup", "kite", "ring"]


def vocabulary(names: list[str] = NAMES) -> Vocabulary:
    return Vocabulary([Category(i + 1, name, f"{name}.n.01") for i, name in enumerate(names)])


def make_recipe(output: Path, **changes: object) -> Recipe:
    source = {"name": "toy", "format": "lvis", "images": "images", "annotations": "a.json"}
    tree = {"name": "run", "output": str(output), "data": {"root": "raw", "train": [source]}}
    training = section().model_dump() | {"keep_checkpoints": 2}
    return Recipe.model_validate({**tree, "training": training, **changes})


def toy_state(seed: int = 0) -> State:
    torch.manual_seed(seed)
    student = toy_student()
    trainable = {n: p.detach() for n, p in student.named_parameters() if p.requires_grad}
    moments = {f"{m}/{n}": p.clone() for n, p in trainable.items() for m in ("exp_avg",)}
    averaged = {name: tensor + 1 for name, tensor in trainable.items()}
    return State(dict(student.state_dict()), averaged, moments, updates=3)


def save_steps(output: Path, *steps: int) -> list[Path]:
    recipe = make_recipe(output)
    return [
        save(toy_state(), Progress(step, 0, {"seed": 0}), recipe, vocabulary(), 1) for step in steps
    ]


def start_and_go_on(folder: str, layout: str) -> list[float]:
    """Two steps, a checkpoint, two more steps: the losses of the last two."""
    engine = _engine(layout, None)
    for step in range(2):
        train_step(engine, step)
    state = engine.state()
    if state is not None:
        recipe = make_recipe(Path(folder, saved_name(layout, dist.get_world_size())))
        save(state, Progress(2, 0, {}), recipe, vocabulary(), dist.get_world_size())
    losses = [train_step(engine, step)[0] for step in (2, 3)]
    _save_last(engine, Path(folder, f"direct_{layout}_{dist.get_world_size()}.pt"))
    return losses


def saved_name(layout: str, world_size: int) -> str:
    return f"{layout} world {world_size}"


def continue_from(folder: str, saved: str, layout: str) -> list[float]:
    """The same last two steps, from a checkpoint."""
    directory = newest_verified(Path(folder, saved, "run"))
    assert directory is not None
    engine = _engine(layout, directory)
    losses = [train_step(engine, step)[0] for step in (2, 3)]
    _save_last(engine, Path(folder, f"{saved}_{layout}_{dist.get_world_size()}.pt"))
    return losses


def _engine(layout: str, directory: Path | None) -> Engine:
    init_process_group(torch.device("cpu"))
    student, state = toy_student(), None
    if directory is not None:
        nn.init.zeros_(student.detector.class_embed.weight)
        state = load_state(directory)
        restore(student, state, directory, vocabulary())
    accumulation = num_micro_batches(BATCH, MICRO, dist.get_world_size())
    return Engine(student, section(**LAYOUTS[layout]), accumulation, state)


def _save_last(engine: Engine, path: Path) -> None:
    state = engine.state()
    if state is not None:
        torch.save([dict(state.weights), dict(state.averaged), dict(state.moments)], path)


def start_all(folder: str, layouts: list[str]) -> list[list[float]]:
    return [start_and_go_on(folder, layout) for layout in layouts]


def continue_all(folder: str, pairs: list[tuple[str, str]]) -> list[list[float]]:
    return [continue_from(folder, saved, layout) for saved, layout in pairs]


def assert_bitwise_equal(first: Path, second: Path) -> None:
    for ours, theirs in zip(
        torch.load(first, weights_only=True), torch.load(second, weights_only=True), strict=True
    ):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert torch.equal(ours[name], theirs[name]), name


def test_resume_in_the_same_layout_is_bitwise_equal(tmp_path: Path) -> None:
    [direct, _] = run_ranks(start_all, 2, str(tmp_path), ["3"])
    [resumed, _] = run_ranks(continue_all, 2, str(tmp_path), [("3 world 2", "3")])
    assert direct == resumed
    assert_bitwise_equal(tmp_path / "direct_3_2.pt", tmp_path / "3 world 2_3_2.pt")


@pytest.mark.slow
def test_any_layout_and_world_size_continues_any_other(tmp_path: Path) -> None:
    """Each stage of ZeRO, and 3 with everything offloaded, saved by one rank and by two."""
    layouts, worlds = ["0", "1", "2", "3", "3 all"], [1, 2]
    expected: dict[str, list[float]] = {}
    for world in worlds:
        losses = run_ranks(start_all, world, str(tmp_path), layouts)[0]
        names = [saved_name(layout, world) for layout in layouts]
        expected |= dict(zip(names, losses, strict=True))
    pairs = list(itertools.product(expected, layouts))
    # Three ranks, and the optimizer alone offloaded, take some of them.
    few = [("0 world 2", "1"), ("1 world 1", "3 all"), ("3 all world 2", "2"), ("2 world 2", "3")]
    loads = {1: pairs, 2: [*pairs, ("3 world 1", "1 optimizer"), ("3 all world 2", "3 optimizer")]}
    for world, of_world in {**loads, 3: few}.items():
        for (saved, layout), losses in zip(
            of_world, run_ranks(continue_all, world, str(tmp_path), of_world)[0], strict=True
        ):
            assert losses == pytest.approx(expected[saved], rel=1e-5), (saved, layout, world)
    for world, layout in itertools.product(worlds, layouts):
        resumed = tmp_path / f"{saved_name(layout, world)}_{layout}_{world}.pt"
        assert_bitwise_equal(tmp_path / f"direct_{layout}_{world}.pt", resumed)


def test_everything_comes_back(tmp_path: Path) -> None:
    [directory] = save_steps(tmp_path, 7)
    assert directory == checkpoint_dir(tmp_path / "run", 7)
    manifest, state, saved = verify(directory), load_state(directory), toy_state()
    assert (manifest.step, manifest.plan, manifest.world_size) == (7, {"seed": 0}, 1)
    assert Vocabulary.from_json(manifest.vocabulary) == vocabulary()
    assert state.updates == 3
    for ours, theirs in ((state.weights, saved.weights), (state.averaged, saved.averaged)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    name = "class_embed.weight"
    assert torch.equal(load_weights(directory, ema=False)[name], saved.weights["detector." + name])
    assert torch.equal(load_weights(directory, ema=True)[name], saved.averaged["detector." + name])


def test_only_the_newest_are_kept_and_unfinished_ones_removed(tmp_path: Path) -> None:
    unfinished = tmp_path / "run" / "checkpoints" / "step_00000002.tmp"
    for folder in (unfinished, unfinished.with_name(".step_00000002.0123456789abcdef.tmp")):
        folder.mkdir(parents=True)
        (folder / "weights.safetensors").write_bytes(b"half")
    save_steps(tmp_path, 1, 2, 3)
    left = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert left == ["step_00000002", "step_00000003"]


def test_a_damaged_later_one_does_not_push_out_what_is_saved_now(tmp_path: Path) -> None:
    *_, later = save_steps(tmp_path, 10, 11, 12)
    cut_short(later)
    _, saved = save_steps(tmp_path, 4, 5)
    assert newest_verified(tmp_path / "run") == saved and not later.exists()


def flip_bit(directory: Path) -> None:
    path = directory / "optimizer.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)


def cut_short(directory: Path) -> None:
    path = directory / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def drop_manifest(directory: Path) -> None:
    (directory / "manifest.json").unlink()


def cut_manifest(directory: Path) -> None:
    path = directory / "manifest.json"
    path.write_text(path.read_text()[:100])


def drop_file(directory: Path) -> None:
    (directory / "averaged.safetensors").unlink()


def put_folder_for_manifest(directory: Path) -> None:
    drop_manifest(directory)
    (directory / "manifest.json").mkdir()


def spoil_disk(directory: Path) -> None:
    """Of a file whose size is right every read fails (EIO)."""
    path = directory / "manifest.json"
    tree = json.loads(path.read_text())
    tree["files"]["weights.safetensors"]["bytes"] = 0
    path.write_text(json.dumps(tree))
    (directory / "weights.safetensors").unlink()
    (directory / "weights.safetensors").symlink_to("/proc/self/mem")


DAMAGES = (flip_bit, cut_short, drop_manifest, cut_manifest, drop_file)
UNREADABLE = (put_folder_for_manifest, spoil_disk)


@pytest.mark.parametrize("damage", [*DAMAGES, *UNREADABLE])
def test_a_damaged_checkpoint_is_named_and_the_older_one_taken(
    tmp_path: Path, damage: object, caplog: pytest.LogCaptureFixture
) -> None:
    older, newer = save_steps(tmp_path, 5, 10)
    assert newest_verified(tmp_path / "run") == newer
    damage(newer)  # type: ignore[operator]
    assert newest_verified(tmp_path / "run") == older
    assert str(newer) in caplog.text
    damage(older)  # type: ignore[operator]
    with pytest.raises(StorageError, match="none of the 2 checkpoints"):
        newest_verified(tmp_path / "run")


def test_a_run_without_checkpoints_starts_from_nothing(tmp_path: Path) -> None:
    assert newest_verified(tmp_path / "run") is None


def test_a_full_disk_leaves_the_older_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [older] = save_steps(tmp_path, 5)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipeline.training.space.WAITS_S", (0.0,))
    monkeypatch.setattr("pipeline.training.checkpoint.save_file", full)
    with pytest.raises(StorageError, match=r"no space left.*tried 2 times.*the same command again"):
        save_steps(tmp_path, 6)
    assert newest_verified(tmp_path / "run") == older
    assert [path.name for path in older.parent.iterdir()] == [older.name]


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    [directory] = save_steps(tmp_path, 5)
    student = toy_student()
    student.detector.box_embed = nn.Linear(5, 3)
    student.detector.added = nn.Linear(2, 2)
    with pytest.raises(RecipeError) as error:
        restore(student, load_state(directory), directory, vocabulary())
    assert "detector.added.weight is missing" in str(error.value)
    assert "detector.box_embed.weight has shape (4, 5), this model (3, 5)" in str(error.value)


def test_a_checkpoint_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    [directory] = save_steps(tmp_path, 5)
    other = vocabulary([*NAMES[:-1], "hoop"])
    with pytest.raises(RecipeError, match=r"7 ring .*7 hoop .*initialize_from"):
        restore(toy_student(), load_state(directory), directory, other)


def test_only_what_does_not_change_learning_may_change_in_a_recipe(tmp_path: Path) -> None:
    [directory] = save_steps(tmp_path, 5)
    training = section(
        zero_stage=3, offload="all", log_every=1, keep_checkpoints=9, activation_checkpointing=True
    ).model_dump()
    refuse_another_recipe(
        directory,
        make_recipe(tmp_path, training=training, cluster={"workers": 2}, description="moved"),
    )
    training = section(learning_rate=3e-4).model_dump()
    with pytest.raises(RecipeError) as error:
        refuse_another_recipe(directory, make_recipe(tmp_path, training=training, seed=1))
    text = str(error.value)
    assert "seed was 0 and is 1" in text
    assert "training.learning_rate was 0.01 and is 0.0003" in text
    assert "zero_stage" not in text and "new name" in text


def test_an_export_holds_the_detector_alone(tmp_path: Path) -> None:
    state = toy_state()
    weights = {**state.weights, "branch.project.weight": torch.ones(2, 2)}
    recipe = make_recipe(tmp_path)
    directory = save(
        State(weights, state.averaged, state.moments, 1),
        Progress(5, 0, {}),
        recipe,
        vocabulary(),
        1,
    )
    output = export_detector(locate_checkpoint(directory), tmp_path / "exported")
    assert sorted(path.name for path in output.iterdir()) == [
        "manifest.json",
        "weights.safetensors",
    ]
    exported = load_file(output / "weights.safetensors")
    assert exported.keys() == {"detector." + name for name in ToyDetector().state_dict()}
    assert json.loads((output / "manifest.json").read_text())["step"] == 5
    with pytest.raises(StorageError, match="exists already"):
        export_detector(locate_checkpoint(directory), output)
    shutil.rmtree(output)


def test_an_export_touches_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [directory] = save_steps(tmp_path, 5)
    beside = tmp_path / "exported.tmp" / "mine.txt"
    beside.parent.mkdir()
    beside.write_text("mine")
    before = sorted(tmp_path.iterdir())
    found = locate_checkpoint(directory)
    output = export_detector(found, tmp_path / "exported")
    assert beside.read_text() == "mine"
    assert sorted(tmp_path.iterdir()) == sorted([*before, output])
    assert output.stat().st_mode == beside.parent.stat().st_mode, "others may read it, too"

    def interrupt(*_: object) -> None:
        (tmp_path / "again").mkdir()
        (tmp_path / "again" / "mine.txt").write_text("came in between")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("pipeline.training.checkpoint.save_file", interrupt)
        export_detector(found, tmp_path / "again")
    shutil.rmtree(tmp_path / "again")
    assert sorted(tmp_path.iterdir()) == sorted([*before, output])

    def take_the_name(path: Path) -> dict[str, object]:
        (tmp_path / "again").mkdir()
        (tmp_path / "again" / "mine.txt").write_text("came in between")
        return {}

    monkeypatch.setattr("pipeline.training.manifest.file_digest", take_the_name)
    with pytest.raises(StorageError, match="again could not be written"):
        export_detector(found, tmp_path / "again")
    assert [path.name for path in (tmp_path / "again").iterdir()] == ["mine.txt"]
    with pytest.raises(StorageError, match="Not a directory"):
        export_detector(found, beside / "exported")


@pytest.mark.slow
def test_any_stage_exports_the_same_detector(tmp_path: Path) -> None:
    stages = ["0", "1", "2", "3"]
    run_ranks(start_all, 2, str(tmp_path), stages)
    exported = []
    for stage in stages:
        directory = newest_verified(tmp_path / saved_name(stage, 2) / "run")
        assert directory is not None
        output = export_detector(locate_checkpoint(directory), tmp_path / f"exported_{stage}")
        exported.append(load_file(output / "weights.safetensors"))
        saved = load_weights(directory, ema=True)
        assert all(torch.equal(exported[-1]["detector." + n], t) for n, t in saved.items())
    fresh = ToyDetector().state_dict()
    for weights in exported:
        assert weights.keys() == {"detector." + name for name in fresh}
        for name, tensor in weights.items():
            torch.testing.assert_close(tensor, exported[0][name], rtol=1e-5, atol=1e-7)
    assert not torch.equal(exported[0]["detector.box_embed.weight"], fresh["box_embed.weight"])
