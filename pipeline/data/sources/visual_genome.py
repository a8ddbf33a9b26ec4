"""Visual Genome (Krishna et al. 2017): boxes with free names, cut to the frequent ones."""

from collections import Counter, defaultdict
from urllib.parse import urlsplit

from pipeline.data.sources.files import read_text
from pipeline.data.sources.forms import refuse_other_form
from pipeline.data.sources.instances import (
    Instances,
    exhaustive_record,
    find_images,
    read_json,
)
from pipeline.data.sources.record import RecordSet
from pipeline.data.vocabulary.categories import Category, Vocabulary
from pipeline.errors import DataError
from pipeline.recipe import Source

MIN_INSTANCES = 30
"""VinVL (Zhang et al. 2021, section 2) keeps the classes of at least 30 boxes, which are 1594.

That is its statement, of its own cleaning of the names; nobody counted the published files here.
"""


def list_visual_genome(
    source: Source, root: str, vocabulary: Vocabulary | None = None
) -> RecordSet:
    """One record for each image of an objects.json (v1.0 to v1.4), in ascending image id.

    `files.image_data` has the images' sizes and places (VG_100K, VG_100K_2). The category of an
    object is its first name, in lower case, or the first name of the line of `files.aliases` that
    has it; where two lines do, the first line decides. Categories with fewer than `min_instances`
    boxes (`MIN_INSTANCES` where it is not given) are dropped, with their boxes counted. Ids are
    ranks: 1 is the most frequent category, equal counts are in order of name, so that another cut
    keeps the ids. A category has the synset that more than half of its boxes have. With a
    `vocabulary`, as of the part that a detector is trained on, its categories are taken by name
    instead. Boxes that are empty, outside or given twice are left out and counted.
    """
    url, tree = read_json(source, root, "annotations", source.annotations)
    refuse_other_form(source.format, tree, url)
    images = _read_images(source, root)
    record_set = RecordSet(Vocabulary([]), [])
    by_image = _read_objects(url, tree, _read_aliases(source, root), record_set)
    unknown = sorted(by_image.keys() - images.keys())
    if unknown:
        raise DataError(
            f"{url}: image {unknown[0]} is not in `files.image_data` {source.files.image_data!r}; "
            "both files must be of one release"
        )
    if vocabulary is None:
        smallest = MIN_INSTANCES if source.min_instances is None else source.min_instances
        vocabulary = _frequent(by_image, smallest)
        reason = f"object of a category with fewer than {smallest} boxes, left out"
    else:
        reason = "object of a name that is no category of the detector, left out"
    record_set.vocabulary = vocabulary
    _keep(by_image, vocabulary, reason, record_set)
    instances = Instances(
        url,
        vocabulary,
        frozenset(vocabulary.ids),
        [images[image_id] for image_id in by_image],
        by_image,
    )
    record_set.records = [
        exhaustive_record(source, instances, record_set, found, {})
        for found in find_images(source, root, instances, _image_names)
    ]
    return record_set


def _image_names(image: dict) -> list[str]:
    path = urlsplit(image["url"]).path.lstrip("/")
    return [path] if path else []


def _read_images(source: Source, root: str) -> dict[int, dict]:
    """Id, width, height and url of each image of image_data.json, by id."""
    url, tree = read_json(source, root, "files.image_data", source.files.image_data)
    images: dict[int, dict] = {}
    for position, entry in enumerate(tree if isinstance(tree, list) else [None]):
        if not isinstance(entry, dict) or not isinstance(entry.get("url"), str):
            raise DataError(
                f"{url}: entry {position} has no url; `files.image_data` is image_data.json, a "
                "list of objects with image_id, width, height and url"
            )
        number, width, height = (entry.get(key) for key in ("image_id", "width", "height"))
        if (
            type(number) is not int
            or type(width) is not int
            or type(height) is not int
            or min(number, width, height) < 1
        ):
            raise DataError(
                f"{url}: entry {position}: image_id {number!r}, width {width!r} and height "
                f"{height!r} must be positive integers"
            )
        if number in images:
            raise DataError(f"{url}: image {number} is given twice; ids must differ")
        image = {"id": number, "width": width, "height": height, "url": entry["url"]}
        images[number] = image
    return images


def _read_aliases(source: Source, root: str) -> dict[str, str]:
    """The canonical name of each alias."""
    if source.files.aliases is None:
        return {}
    url, text = read_text(source, root, "files.aliases", source.files.aliases)
    if text.lstrip()[:1] in ("{", "["):
        raise DataError(
            f"{url}: this is json, and `files.aliases` is object_alias.txt, whose lines are names "
            "with commas between them"
        )
    canonical: dict[str, str] = {}
    for line in text.splitlines():
        first, *others = (_plain(name) for name in line.split(","))
        for name in (first, *others):
            if first and name:
                canonical.setdefault(name, first)
    return canonical


def _plain(name: str) -> str:
    return " ".join(name.casefold().split())


def _read_objects(
    url: str, tree: object, aliases: dict[str, str], record_set: RecordSet
) -> dict[int, list[dict]]:
    """The objects of each image, with `name`, `bbox` and `synset`; those without name are dropped.

    Raises `DataError` for an image that is given twice, and for an entry of another form.
    """
    by_image: dict[int, list[dict]] = {}
    for position, entry in enumerate(tree if isinstance(tree, list) else [None]):
        # v1.0 calls the image's id `id`.
        number = entry.get("image_id", entry.get("id")) if isinstance(entry, dict) else None
        objects = entry.get("objects") if isinstance(entry, dict) else None
        if type(number) is not int or number < 0 or not isinstance(objects, list):
            raise DataError(
                f"{url}: entry {position} must have an integer image_id and a list of objects; "
                "`annotations` of format visual_genome is objects.json"
            )
        if number in by_image:
            raise DataError(f"{url}: image {number} is given twice; ids must differ")
        by_image[number] = []
        for thing in objects:
            if not isinstance(thing, dict):
                raise DataError(f"{url}: image {number}: {thing!r} is no object")
            key = thing.get("object_id", thing.get("id"))
            names = [_plain(str(name)) for name in thing.get("names") or ()]
            name = next(filter(None, names), None)
            if name is None:
                record_set.drop(
                    "object without a name, left out", f"object {key} of image {number}"
                )
                continue
            by_image[number].append(
                {
                    "id": key,
                    "bbox": [thing.get(side) for side in ("x", "y", "w", "h")],
                    "name": aliases.get(name, name),
                    "synset": next(iter(thing.get("synsets") or ()), None),
                }
            )
    return by_image


def _frequent(by_image: dict[int, list[dict]], smallest: int) -> Vocabulary:
    """The categories of the names that so many objects have."""
    counts = Counter(thing["name"] for things in by_image.values() for thing in things)
    image_counts = Counter(
        name for things in by_image.values() for name in {thing["name"] for thing in things}
    )
    synsets: dict[str, Counter[str]] = defaultdict(Counter)
    for things in by_image.values():
        for thing in things:
            if thing["synset"] is not None:
                synsets[thing["name"]][thing["synset"]] += 1
    ranked = sorted(counts, key=lambda name: (-counts[name], name))
    categories = []
    for rank, name in enumerate(ranked, start=1):
        if counts[name] < smallest:
            break
        synset, votes = next(iter(synsets[name].most_common(1)), (None, 0))
        categories.append(
            Category(
                id=rank,
                name=name,
                synset=synset if 2 * votes > counts[name] else None,
                image_count=image_counts[name],
                instance_count=counts[name],
            )
        )
    if ranked and not categories:
        raise DataError(
            f"no category has {smallest} boxes; the most frequent, {ranked[0]}, has "
            f"{counts[ranked[0]]}. Lower `min_instances`"
        )
    return Vocabulary(categories)


def _keep(
    by_image: dict[int, list[dict]], vocabulary: Vocabulary, reason: str, record_set: RecordSet
) -> None:
    """Give objects their `category_id`; those of other names are left out, for the `reason`."""
    ids = {category.name: category.id for category in vocabulary.categories}
    for number, things in by_image.items():
        kept = []
        for thing in things:
            if thing["name"] in ids:
                kept.append({**thing, "category_id": ids[thing["name"]]})
                continue
            record_set.drop(reason, f"object {thing['id']} of image {number}: {thing['name']}")
        by_image[number] = kept
