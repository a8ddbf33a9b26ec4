"""What is known of a stage's data before anything is read of it: indexes and categories."""

from collections.abc import Mapping

from pipeline.data.shards.index import Index, load_index
from pipeline.data.shards.preparing import shards_url
from pipeline.data.sources import list_categories, list_records
from pipeline.data.storage.files import exists, resolve
from pipeline.data.vocabulary.categories import Vocabulary
from pipeline.data.vocabulary.category_map import used_map
from pipeline.errors import RecipeError, StorageError
from pipeline.recipe import Recipe, Source


def find_data(recipe: Recipe, source: Source) -> Index | None:
    """The index of a prepared source; None where raw data is there to prepare it from."""
    data = recipe.data
    try:
        return load_index(shards_url(data, source))
    except StorageError:
        places = [resolve(data.root, part) for part in (source.annotations, source.images) if part]
        absent = [place for place in places if not exists(place)]
        if data.miniature is not None or not absent:
            return None
        raise RecipeError(
            f"recipe {recipe.name}: source {source.name} has neither shards at "
            f"{shards_url(data, source)} nor raw data at {' and '.join(absent)}; set data.root to "
            "the folder that holds the raw data sets"
        ) from None


def detector_vocabulary(recipe: Recipe) -> Vocabulary | None:
    """The detector's categories as they are now: of the index, else of the raw data."""
    source = recipe.data.vocabulary_source
    return vocabulary_of(recipe, {source.name: find_data(recipe, source)})


def vocabulary_of(recipe: Recipe, indexes: Mapping[str, Index | None]) -> Vocabulary | None:
    """The detector's categories, where they can be known before anything is drawn."""
    source = recipe.data.vocabulary_source
    index = indexes[source.name]
    if index is not None:
        return index.vocabulary
    if exists(resolve(recipe.data.root, source.annotations or source.images)):
        return list_records(source, recipe.data.root).vocabulary
    return None


def check_labels(
    recipe: Recipe, indexes: Mapping[str, Index | None], vocabulary: Vocabulary | None
) -> None:
    """Raise, where both sides are known, what the stream would raise for a source whose labels
    reach no category of the detector."""
    if vocabulary is None:
        return
    for source in (*recipe.data.train, *recipe.data.extra):
        if source == recipe.data.vocabulary_source:
            continue
        theirs = _categories_of(recipe, source, indexes[source.name])
        if theirs is not None:
            used_map(source, theirs, vocabulary, recipe.data.root)


def check_prepared(recipe: Recipe) -> None:
    """The same once all of them are prepared, before anything is made with them."""
    data = recipe.data
    used = {s.name: s for s in (*data.train, *data.extra, data.vocabulary_source)}
    indexes = {name: find_data(recipe, source) for name, source in used.items()}
    check_labels(recipe, indexes, vocabulary_of(recipe, indexes))


def _categories_of(recipe: Recipe, source: Source, index: Index | None) -> Vocabulary | None:
    """Those of a source with labels, where they can be known before it is prepared, or it is."""
    if index is not None or not source.has_labels:
        return None if index is None else index.vocabulary
    named = [path for path in (source.annotations, source.files.classes) if path is not None]
    if not all(exists(resolve(recipe.data.root, path)) for path in named):
        return None
    return list_categories(source, recipe.data.root)
