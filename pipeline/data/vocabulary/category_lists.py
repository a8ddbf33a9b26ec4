"""The categories of anything that has some: annotations, tables, prepared shards, a recipe."""

import csv
import io
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.data.shards.index import HEADER_FILE, load_index
from pipeline.data.shards.preparing import shards_url
from pipeline.data.sources import list_records
from pipeline.data.sources.files import decode_text
from pipeline.data.sources.instances import read_categories
from pipeline.data.storage.files import exists, publish_bytes, read_bytes, resolve
from pipeline.data.vocabulary.categories import Category, Vocabulary, clean_name
from pipeline.data.vocabulary.category_map import match_categories
from pipeline.errors import DataError, RecipeError, StorageError
from pipeline.recipe_file import load_recipe

LISTED = ("id", "name", "synset", "frequency", "image_count", "aliases")
SHORT_NAMES = {
    "lvis": ("lvis/lvis_v1_val.json", "lvis/lvis_v1_train.json"),
    "o365": ("objects365/zhiyuan_objv2_val.json", "objects365/zhiyuan_objv2_train.json"),
    "coco": (
        "coco/annotations/instances_val2017.json",
        "coco/annotations/instances_train2017.json",
    ),
    "openimages": ("openimages/class-descriptions-boxable.csv",),
    "imagenet21k": ("imagenet21k/wnid_to_lvis.tsv",),
}
"""Files under a root that a short name means: longtail carries no data set's categories."""
KINDS = (
    "an annotation json, a csv or tsv of categories, a folder or URL of prepared shards, "
    "RECIPE.yaml, RECIPE.yaml:SOURCE, or one of the short names "
    f"{', '.join(name.upper() for name in SHORT_NAMES)}"
)


def read_vocabulary(place: str, root: str = ".") -> Vocabulary:
    """The categories at `place`, which is one of `KINDS`; short names are looked for in `root`.

    Raises `RecipeError` for a place that is nothing of the kind, `DataError` for a file that holds
    no categories.
    """
    recipe = re.fullmatch(r"(.+\.ya?ml)(?::(.*))?", place)
    if recipe:
        return _of_recipe(recipe[1], recipe[2])
    url = resolve(place)
    if exists(f"{url}/{HEADER_FILE}"):
        return load_index(url).vocabulary
    if "://" not in url and Path(url).is_dir():
        raise RecipeError(
            f"{place} is a folder without {HEADER_FILE}, so no prepared source; name the folder "
            "of one source's shards, or an annotation file"
        )
    if exists(url):
        return _of_file(url, read_bytes(url))
    if place.casefold() in SHORT_NAMES:
        return _of_short_name(place, root)
    raise RecipeError(f"{place}: there is no such file; name {KINDS}")


def with_synsets(vocabulary: Vocabulary, url: str) -> Vocabulary:
    """The same categories, with the synset that a file gives for the name where they have none.

    The file is json, {name: synset} or, as published for COCO, {name: {"synset": synset, ...}}, or
    a csv with the columns name and synset.
    """
    synsets = _read_synsets(resolve(url))
    categories = [
        replace(c, synset=c.synset or synsets.get(clean_name(c.name).casefold()))
        for c in vocabulary.categories
    ]
    return Vocabulary(categories)


def list_csv(vocabulary: Vocabulary) -> str:
    """The categories as a table that `read_vocabulary` reads again."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(LISTED)
    for category in vocabulary.categories:
        cells = (category.id, category.name, category.synset, category.frequency)
        writer.writerow([*cells, category.image_count, "|".join(category.aliases)])
    return buffer.getvalue()


def map_places(
    source: str, target: str, *, root: str = ".", synsets: str | None = None, output: str
) -> tuple[str, str]:
    """Write the map between two places for review; the csv, and one line of counts.

    `synsets` is for the categories of either side that have none. Raises `RecipeError` where
    `output` is there already and differs: somebody may have corrected it.
    """
    sides = [read_vocabulary(place, root) for place in (source, target)]
    if synsets is not None:
        sides = [with_synsets(side, synsets) for side in sides]
    found = match_categories(*sides)
    table = found.to_csv()
    url = resolve(output)
    if exists(url) and read_bytes(url) != table.encode():
        raise RecipeError(
            f"{output} exists and holds something else, perhaps corrections; delete it, or name "
            "another file with -o"
        )
    publish_bytes(url, table.encode())
    return table, found.describe()


def _of_recipe(path: str, name: str | None) -> Vocabulary:
    """Of a source, or of the detector: from shards where it is prepared, else from raw data."""
    data = load_recipe(path).data
    named = {source.name: source for source in data.sources}
    if name is not None and name not in named:
        raise RecipeError(f"{path} has no source {name!r}; its sources are {', '.join(named)}")
    source = data.vocabulary_source if name is None else named[name]
    try:
        return load_index(shards_url(data, source)).vocabulary
    except StorageError:
        return list_records(source, data.root).vocabulary


def _of_short_name(name: str, root: str) -> Vocabulary:
    places = [resolve(root, path) for path in SHORT_NAMES[name.casefold()]]
    for place in places:
        if exists(place):
            return _of_file(place, read_bytes(place))
    raise RecipeError(
        f"{name} stands for {' or '.join(places)}, and there is no such file; longtail carries no "
        "data set's categories: give --root, the folder that holds the data sets, or the path of "
        "an annotation file"
    )


def _of_file(url: str, data: bytes) -> Vocabulary:
    text = decode_text(url, data)
    if url.casefold().endswith((".csv", ".tsv", ".txt")):
        return _of_table(url, text)
    try:
        tree = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{url}: not valid json ({error}); name {KINDS}") from None
    return read_categories({"categories": tree} if isinstance(tree, list) else tree, url)


def _of_table(url: str, text: str) -> Vocabulary:
    """With a header (id, name, synset, frequency, aliases; a prefix such as lvis_v1_ is left out)
    or without: id, name, and perhaps a better spelling of the name, which becomes an alias; or
    OpenImages' class descriptions, whose ids count their lines as its source does."""
    delimiter = "\t" if "\t" in text.partition("\n")[0] else ","
    rows = [row for row in csv.reader(io.StringIO(text), delimiter=delimiter) if row]
    if not rows:
        raise DataError(f"{url} is empty; name {KINDS}")
    head = [cell.strip().removeprefix("lvis_").removeprefix("v1_") for cell in rows[0]]
    if {"id", "name"} <= set(head):
        cells = [dict(zip(head, row, strict=False)) for row in rows[1:]]
        first = 2
    elif rows[0][0].strip().isdecimal() and len(rows[0]) > 1:
        cells = [{"id": row[0], "name": row[1], "aliases": "|".join(row[2:3])} for row in rows]
        first = 1
    elif rows[-1][0].startswith("/m/") and len(rows[-1]) == 2:
        rows = [row for row in rows if row[0] != "LabelName"]
        cells = [
            {"id": str(k), "name": row[1], "aliases": row[0]} for k, row in enumerate(rows, start=1)
        ]
        first = 1
    else:
        raise DataError(
            f"{url}: the first line {','.join(rows[0])[:80]!r} is neither a header with id and "
            "name nor an id and a name; for a data set whose ids longtail gives, name its "
            "prepared shards or RECIPE.yaml:SOURCE"
        )
    categories = [_category(row, f"{url}, line {k}") for k, row in enumerate(cells, start=first)]
    try:
        return Vocabulary(list(dict.fromkeys(categories)))
    except DataError as error:
        raise DataError(f"{url}: {error}") from None


def _category(row: dict[str, str], where: str) -> Category:
    number, name = row.get("id", "").strip(), row.get("name", "").strip()
    if not (number.isascii() and number.isdecimal()):
        raise DataError(f"{where}: id {number!r} must be an integer of at least 0")
    others = (alias.strip() for alias in row.get("aliases", "").split("|"))
    return Category(
        id=int(number),
        name=name,
        synset=row.get("synset") or None,
        frequency=row.get("frequency") or None,  # type: ignore[arg-type]
        aliases=tuple(alias for alias in others if alias not in ("", name)),
    )


def _read_synsets(url: str) -> dict[str, str]:
    text = decode_text(url, _read_file(url))
    pairs: Sequence[tuple[str, object]]
    if url.casefold().endswith(".csv"):
        table = csv.DictReader(io.StringIO(text))
        pairs = [(row.get("name") or "", row.get("synset")) for row in table]
    else:
        try:
            tree = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{url}: not valid json ({error})") from None
        if not isinstance(tree, dict):
            raise DataError(f"{url}: synsets are a json object of names, not a list")
        pairs = [(k, v.get("synset") if isinstance(v, dict) else v) for k, v in tree.items()]
    found = {
        clean_name(name).casefold(): synset
        for name, synset in pairs
        if name and isinstance(synset, str) and synset
    }
    if not found:
        raise DataError(
            f"{url} gives no synset for any name; it must be json, {{name: synset}} or {{name: "
            '{"synset": synset}}, or a csv with the columns name and synset'
        )
    return found


def _read_file(url: str) -> bytes:
    """The file; `RecipeError` where there is none."""
    try:
        return read_bytes(url)
    except FileNotFoundError:
        raise RecipeError(f"{url}: there is no such file") from None
