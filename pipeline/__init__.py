"""longtail: long-tail object detection with soft labels from a frozen CLIP teacher."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from pipeline.evaluation.predict import LoadedDetector

__version__ = "0.1.0"


def load_detector(path: "str | Path", *, device: "torch.device | str" = "cpu") -> "LoadedDetector":
    """A trained detector, ready to predict; see `pipeline.evaluation.predict.load_detector`.

    Heavy imports happen here, so that `import pipeline` answers at once.
    """
    from pipeline.evaluation import predict

    return predict.load_detector(path, device=device)
