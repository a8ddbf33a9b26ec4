"""`longtail inspect`: what prepared shards hold, in words and as one page for each source."""

import difflib
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from pipeline.data.shards.index import Index, load_index
from pipeline.data.shards.preparing import shards_url
from pipeline.data.storage.files import resolve
from pipeline.data.vocabulary.categories import clean_name
from pipeline.errors import RecipeError, StorageError
from pipeline.progress import Progress
from pipeline.recipe_file import load_recipe
from pipeline.report.categories import FREQUENCIES
from pipeline.report.charts import rank_chart
from pipeline.report.contact_sheet import contact_sheet
from pipeline.report.document import document, publish
from pipeline.report.elements import bar_legend, facts, figure, folded, note, section
from pipeline.report.shard_facts import (
    SampleFacts,
    ShardFacts,
    choose_samples,
    facts_of,
    look_at,
)

MAX_COLUMNS = 1500
"""Of more categories than these, the frequency plot shows every n-th."""
_LISTED = 12


def inspect_sources(
    place: str,
    overrides: Sequence[str],
    output: Path,
    *,
    samples: int,
    category: str | None = None,
    rare_first: bool = False,
    verify: bool = False,
) -> Iterator[str]:
    """Write `output`/SOURCE.html for the shards at `place`, or for every source of a recipe.

    Yields the counts of each source as text, with the path of its page. Raises `RecipeError` for
    an unknown category, `StorageError` for shards that are missing or, with `verify`, damaged.
    """
    if samples < 0:
        raise RecipeError(f"--samples is {samples}; it must be at least 0")
    for index in _indexes(place, overrides):
        chosen = None if category is None else _category_id(index, category)
        if verify:
            index.verify()
        known, seen = facts_of(index), look_at(index)
        places = choose_samples(index, samples, category_id=chosen, rare_first=rare_first)
        page = render(index, known, seen, places, chosen)
        path = publish(output / f"{index.name}.html", page)
        text = describe(index, known, seen)
        if verify:
            text += f"\n  verified    all {known.shards:,} shards have their sha256"
        yield f"{text}\n  page        {path}"


def describe(index: Index, known: ShardFacts, seen: SampleFacts) -> str:
    """The counts of a source as lines of text."""
    lines = [f"{index.name}, at {index.url}"]
    lines += [f"  {name:<11} {value}" for name, value in _counts(known, seen)]
    for reason, count in _left_out(known):
        lines.append(f"  left out    {count:,} {reason}")
    return "\n".join(lines)


def render(
    index: Index,
    known: ShardFacts,
    seen: SampleFacts,
    places: Sequence[int],
    category_id: int | None = None,
) -> str:
    """The whole page as text."""
    name = None
    if category_id is not None:
        name = index.vocabulary.names[index.vocabulary.column_of(category_id)]
    header = [
        ("images", f"{known.samples:,}"),
        ("boxes", f"{known.boxes:,}"),
        ("categories with boxes", f"{_with_boxes(known):,} of {len(known.image_counts):,}"),
        ("shards", f"{known.shards:,}"),
        ("size", _size(known.num_bytes)),
        ("index", index.digest),
    ]
    body = [
        _frequency_section(index, known),
        section("In numbers", facts(_counts(known, seen))),
        _left_out_section(known),
        _sheet_section(index, known, places, name),
    ]
    return document(index.name, f"Prepared shards at {index.url}", facts(header), "".join(body))


def _indexes(place: str, overrides: Sequence[str]) -> Iterator[Index]:
    if not place.endswith((".yaml", ".yml")):
        if overrides:
            raise RecipeError(f"{overrides[0]} belongs to a recipe, and {place} is none")
        yield load_index(resolve(place))
        return
    data = load_recipe(place, overrides).data
    for source in data.sources:
        try:
            yield load_index(shards_url(data, source))
        except StorageError as error:
            raise StorageError(f"source {source.name}: {error}") from None


def _category_id(index: Index, name: str) -> int:
    names = {clean_name(c.name).casefold(): c.id for c in index.vocabulary.categories}
    asked = clean_name(name).casefold()
    if asked not in names:
        close = difflib.get_close_matches(asked, names, n=3)
        hint = f"; did you mean {' or '.join(repr(word) for word in close)}?" if close else ""
        raise RecipeError(
            f"--category {name!r} is none of the {len(names)} categories of {index.name}{hint}"
        )
    return names[asked]


def _with_boxes(known: ShardFacts) -> int:
    return sum(count > 0 for count in known.image_counts.values())


def _counts(known: ShardFacts, seen: SampleFacts) -> list[tuple[str, str]]:
    boxes = f"{known.boxes:,}"
    if known.unlabelled_boxes:
        boxes += f", {known.unlabelled_boxes:,} of them without a label"
    if known.samples:
        boxes += f"; {known.boxes / known.samples:.1f} an image, at most {known.most_boxes:,}"
    pairs = [
        ("images", f"{known.samples:,}, {known.images_without_boxes:,} of them without boxes"),
        ("boxes", boxes),
        ("categories", f"{len(known.image_counts):,}, {_with_boxes(known):,} of them with boxes"),
    ]
    groups = known.group_counts()
    if groups:
        rule = "" if known.declared else ", by the images counted here"
        words = [
            f"{FREQUENCIES[group]} {total:,} ({found:,} with boxes)"
            for group, (total, found) in groups.items()
        ]
        pairs.append(("groups", ", ".join(words) + rule))
    for name, values in (("short side", known.shorter), ("long side", known.longer)):
        low, fifth, middle, high, top = values
        pairs.append(
            (name, f"{low} to {top} pixels; median {middle}, 5% below {fifth}, 5% above {high}")
        )
    pairs.append(("shards", f"{known.shards:,}, {_size(known.num_bytes)}"))
    if seen.samples:
        scope = "all" if seen.samples == known.samples else f"{seen.samples:,} samples read"
        pairs.append(
            (
                "samples",
                f"of {scope}: {seen.captions:,} with a caption, {seen.coarse:,} coarse, "
                f"{seen.with_negatives:,} with negative categories ({seen.negatives:,} in sum), "
                f"{seen.not_exhaustive:,} categories not exhaustive",
            )
        )
    return pairs


def _left_out(known: ShardFacts) -> list[tuple[str, int]]:
    found = [(reason, count) for reason, count in known.dropped.items() if count]
    if known.unreadable:
        found.append(("unreadable images", len(known.unreadable)))
    return found


def _frequency_section(index: Index, known: ShardFacts) -> str:
    """Images of each category, most first, in the colours of the report."""
    ranked = sorted(
        (number for number, count in known.image_counts.items() if count),
        key=lambda number: (-known.image_counts[number], "fcr".find(_group(known, number)), number),
    )
    if not ranked:
        return ""
    every = -(-len(ranked) // MAX_COLUMNS)
    columns = []
    for number in ranked[::every]:
        name = clean_name(index.vocabulary.names[index.vocabulary.column_of(number)])
        count, boxes = known.image_counts[number], known.box_counts[number]
        words = f"{name}: images {count:,}, boxes {boxes:,}"
        columns.append((words, FREQUENCIES.get(_group(known, number), "plain"), float(count)))
    title = "Images of each category, most first"
    chart = rank_chart(
        columns,
        [(10, "10 images"), (100, "100 images")],
        title,
        ("categories by rank", "images (logarithmic)"),
    )
    styles = {style for _, style, _ in columns}
    names = [(name, name) for name in FREQUENCIES.values() if name in styles]
    text = (
        "Colours are the data set's own frequency groups, counted over its training part. "
        if known.declared
        else "The data set states no frequency groups; colours follow from the images counted "
        "here: rare up to 10, common up to 100. "
    )
    absent = len(known.image_counts) - len(ranked)
    if absent:
        text += f"{absent:,} categories have no box here. "
    if every > 1:
        text += f"One in {every} of {len(ranked):,} categories is drawn. "
    return section(
        "Categories",
        figure(title, bar_legend(names), f'<div class="wide">{chart}</div>'),
        note(text),
    )


def _group(known: ShardFacts, number: int) -> str:
    return known.groups.get(number) or ""


def _sheet_section(
    index: Index, known: ShardFacts, places: Sequence[int], named: str | None
) -> str:
    if not places:
        text = "No image has this category." if named else "No picture was asked for."
        return section("Pictures", note(text))
    with Progress(f"pictures of {index.name}", "pictures") as progress:
        samples = []
        for done, place in enumerate(places, start=1):
            shard, _, _ = index.span(place)
            sample = index.read(place)
            samples.append((f"{sample.key} in {index.shards[shard].file}", sample))
            progress.update(done, len(places))
    text = f"{len(places)} of {known.samples:,} images, "
    text += (
        f"with {clean_name(named)}."
        if named
        else "each of another category where there are so many, from rare to frequent."
    )
    text += " Names stand where there is room, and all show on hover."
    if known.declared:
        text += " Red: rare categories."
    groups = known.groups if known.declared else {}
    sheet = contact_sheet(samples, index.vocabulary, groups, named)
    return section("Pictures", note(text), sheet)


def _left_out_section(known: ShardFacts) -> str:
    found = _left_out(known)
    if not found:
        return section("Left out or altered", note("Nothing."))
    examples = dict(known.examples)
    examples["unreadable images"] = [reason for _, reason in known.unreadable[:_LISTED]]
    parts = [
        folded(f"{count:,} {reason}", _listed(examples.get(reason, []))) for reason, count in found
    ]
    return section("Left out or altered", *parts)


def _listed(texts: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return f"<ul>{items}</ul>" if items else note("No example was kept.")


def _size(num_bytes: int) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes / 1e3:,.1f} kB"
