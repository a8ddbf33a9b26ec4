"""What a stage is going to do, as lines of text."""

from collections import Counter
from collections.abc import Mapping

from pipeline.check.needs import sources_of
from pipeline.data.plan.steps import Plan
from pipeline.data.shards.index import Index
from pipeline.data.vocabulary.categories import Vocabulary
from pipeline.recipe import Recipe


def describe(
    recipe: Recipe, indexes: Mapping[str, Index | None], vocabulary: Vocabulary | None
) -> list[str]:
    training, cluster = recipe.training, recipe.cluster
    slice_size = -(-training.batch_size // cluster.max_workers)
    micro_steps = -(-slice_size // training.micro_batch)
    workers = str(cluster.max_workers)
    if cluster.is_elastic:
        workers += f" (at least {cluster.min_workers})"
    lines = [
        f"{recipe.name} (recipe {recipe.hash()}), in {recipe.run_dir}",
        f"  batch       {training.batch_size} images = {workers} workers x {slice_size}, "
        f"in {micro_steps} micro-steps of at most {training.micro_batch}; "
        f"ZeRO {training.zero_stage}, {training.precision}",
    ]
    if recipe.initialize_from:
        lines.append(f"  starts from {recipe.initialize_from}")
    if vocabulary is not None:
        groups = Counter(vocabulary.frequencies)
        text = f"  vocabulary  {vocabulary.num_categories} categories"
        if groups["r"] or groups["c"] or groups["f"]:
            text += f" ({groups['r']} rare, {groups['c']} common, {groups['f']} frequent)"
        lines.append(text)
    if recipe.uses_soft_labels:
        from pipeline.semantics.clip import model_config
        from pipeline.semantics.towers.choice import describe_regions

        regions = describe_regions(recipe.teacher, model_config(recipe.teacher.model))
        lines.append(f"  teacher     {recipe.teacher.model}, {regions}")
    for source in sources_of(recipe):
        index = indexes[source.name]
        state = "to be prepared" if index is None else f"{index.num_samples:,} images prepared"
        learned = source in (*recipe.data.train, *recipe.data.extra)
        absent = recipe.terms_left_out(source) if learned else ""
        lines.append(
            f"  source      {source.name} ({source.format}): {state}{absent and f'; {absent}'}"
        )
    lines.extend(mixture(recipe, plan_of(recipe, indexes, vocabulary)))
    return lines


def worst_canvas(recipe: Recipe, images: int) -> tuple[int, int]:
    """Height and width that no micro-batch of so many images exceeds, with padding."""
    from pipeline.data.plan.geometry import largest_canvas

    data = recipe.data
    mosaics = bool(data.extra) and data.transforms.mosaic
    return largest_canvas(data.transforms, images, mosaics=mosaics)


def bounds(recipe: Recipe, vocabulary: Vocabulary | None) -> str:
    """What no micro-batch exceeds, whatever the annotations hold."""
    from pipeline.detectors.dino.bounds import branch_bytes, step_bounds

    data, images = recipe.data, recipe.training.micro_batch
    height, width = worst_canvas(recipe, images)
    most = step_bounds(recipe.detector, data.max_boxes, images)
    branch, semantic = "", recipe.semantic
    if semantic is not None and semantic.objective == "logits" and vocabulary is not None:
        size = branch_bytes(
            recipe.detector, semantic, data.max_boxes, images, vocabulary.num_categories
        )
        branch = f", {size / 1e6:.1f} MB for the distributions of the semantic branch"
    return (
        f"  at most     {images} x {height}x{width} pixels a micro-batch; {most.boxes} boxes and "
        f"{most.queries} + {most.denoising_queries} queries an image: "
        f"{most.cost_bytes / 1e6:.1f} MB for the matrix of matching costs, "
        f"{most.mask_bytes / 1e6:.1f} MB for attention masks{branch}"
    )


def plan_of(
    recipe: Recipe, indexes: Mapping[str, Index | None], vocabulary: Vocabulary | None
) -> Plan | None:
    """The plan of the whole run, None before all of its sources are prepared."""
    prepared = {name: index for name, index in indexes.items() if index is not None}
    used = [*recipe.data.train, *recipe.data.extra]
    if vocabulary is None or any(source.name not in prepared for source in used):
        return None
    from pipeline.data.stream.batches import source_readers, training_plan

    readers = source_readers(used, prepared, vocabulary, recipe.data.root)
    return training_plan(recipe.data, recipe.training, readers, recipe.seed)


def mixture(recipe: Recipe, plan: Plan | None) -> list[str]:
    """Steps of each kind, samples and epochs of each source."""
    steps = recipe.training.steps
    if plan is None:
        return [f"  steps       {steps:,}; the mixture is known once the sources are prepared"]
    kinds, samples = plan.steps_before(steps), plan.samples_before(steps)
    lengths = plan.epoch_lengths
    lines = [f"  steps       {steps:,}: " + ", ".join(f"{n:,} {kind}" for kind, n in kinds.items())]
    for name, number in samples.items():
        epochs = number / lengths[name]
        lines.append(
            f"  samples     {number:,} of {name}: {epochs:.2f} epochs of {lengths[name]:,}"
        )
    return lines
