"""What Ray Train's controller is told to do and to say, without a cluster."""

from pathlib import Path

from tiny_world import tiny_recipe

from pipeline.cluster import connection  # first: it sets what Ray reads
from pipeline.training.manifest import MANIFEST, checkpoint_dir

assert connection is not None

from pipeline.cluster.controller import Supervisor  # noqa: E402


def test_a_damaged_manifest_is_passed_over_in_words(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, "damaged")
    supervisor = Supervisor(None, recipe, recipe.run_dir)
    assert supervisor._from_checkpoint() == "from the beginning"
    for step, text in ((2, "{"), (4, "[]")):
        checkpoint_dir(recipe.run_dir, step).mkdir(parents=True)
        (checkpoint_dir(recipe.run_dir, step) / MANIFEST).write_text(text)
    (checkpoint_dir(recipe.run_dir, 6) / MANIFEST).mkdir(parents=True)
    assert supervisor._from_checkpoint() == "from the beginning"
