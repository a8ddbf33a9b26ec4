"""What a user can get wrong, with the exit code that each kind ends the program with."""


class LongtailError(ValueError):
    """Base of every error that is shown to the user as one paragraph without a traceback."""

    exit_code = 70


class RecipeError(LongtailError):
    """The recipe, or a path or override that it names, cannot work."""

    exit_code = 78


class DataError(LongtailError):
    """An annotation, image or shard is wrong, or more samples are bad than the budget allows."""

    exit_code = 65


class StorageError(LongtailError):
    """Storage did not give or take what it should: missing, truncated, full or unreachable."""

    exit_code = 74


class StopRequested(LongtailError):  # noqa: N818 - a request, not an error
    """The run was asked to stop and has saved a checkpoint; the same command continues it."""

    exit_code = 75


class ClusterError(LongtailError):
    """The cluster failed: processes or nodes were lost, or Ray is gone; the same command goes on
    from the newest checkpoint."""

    exit_code = 75


class MemoryExceeded(LongtailError):  # noqa: N818 - named as the torch error that it stands for
    """A worker needed more memory than there is, and would again: the recipe asks too much."""

    exit_code = 78
