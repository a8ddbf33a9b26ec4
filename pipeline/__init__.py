"""longtail: long-tail object detection with soft labels from a frozen CLIP teacher."""

__version__ = "0.1.0"
