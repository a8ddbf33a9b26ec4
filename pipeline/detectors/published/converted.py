"""What a public checkpoint becomes in our names, with an account of every tensor of it."""

from typing import NamedTuple

from torch import Tensor


class Converted(NamedTuple):
    """A public model's tensors under our detector's names.

    `weights` and `names` have the same keys: our names, with the tensor and with the name that it
    had. `dropped` is, by their name, why a tensor isn't needed. Names of theirs in neither are
    unknown: the caller reports them as left over.
    """

    weights: dict[str, Tensor]
    names: dict[str, str]
    dropped: dict[str, str]
