"""Steps of the stream whose soft labels are asked for before they are trained on."""

from collections import deque
from collections.abc import Iterator

from pipeline.data.stream.batches import StepBatches
from pipeline.errors import LongtailError
from pipeline.semantics.soft_labels import SoftLabels


def asked_ahead(
    steps: Iterator[StepBatches], soft_labels: SoftLabels | None
) -> Iterator[StepBatches]:
    """The same steps in the same order, with labels asked for `batches_ahead` steps before.

    So many steps are held besides the one in use. What reading raises is raised when its step is
    due, so that the steps before it are trained on.
    """
    ahead = 0 if soft_labels is None else soft_labels.batches_ahead
    held: deque[StepBatches] = deque()
    failure: LongtailError | None = None
    more = True
    while True:
        while more and len(held) <= ahead:
            try:
                batches = next(steps, None)
            except LongtailError as error:
                failure, batches = error, None
            if batches is None:
                more = False
                break
            if soft_labels is not None:
                for batch in batches.micro_batches:
                    soft_labels.ask(batch)
            held.append(batches)
        if not held:
            if failure is not None:
                raise failure
            return
        yield held.popleft()
