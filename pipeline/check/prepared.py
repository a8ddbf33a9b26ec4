"""What is known of a stage's data before anything is read of it: indexes and categories."""

from collections.abc import Mapping

from pipeline.data.shards.index import Index, load_index
from pipeline.data.shards.preparing import shards_url
from pipeline.data.sources import list_records
from pipeline.data.storage.files import exists, resolve
from pipeline.data.vocabulary.categories import Vocabulary
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


def vocabulary_of(recipe: Recipe, indexes: Mapping[str, Index | None]) -> Vocabulary | None:
    """The detector's categories, where they can be known before anything is drawn."""
    source = recipe.data.vocabulary_source
    index = indexes[source.name]
    if index is not None:
        return index.vocabulary
    if exists(resolve(recipe.data.root, source.annotations or source.images)):
        return list_records(source, recipe.data.root).vocabulary
    return None
