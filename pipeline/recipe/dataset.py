"""One data set to prepare, without a recipe around it."""

from pipeline.recipe.data import Shards, Source
from pipeline.recipe.section import Section
from pipeline.recipe.training import Cluster


class DataSet(Section):
    """What `longtail prepare --format ...` is told, in the sections that a recipe has too."""

    source: Source
    data: Shards
    cluster: Cluster = Cluster()
