"""Storing images at a smaller side, to save storage and bandwidth."""

from dataclasses import replace
from io import BytesIO

import numpy as np
from PIL import Image, features
from PIL import __version__ as pillow_version

from pipeline.data.images import decode_image
from pipeline.data.sample import Sample

JPEG_QUALITY = 95


def encoder_name() -> str:
    """The encoder with its versions; another one may write other bytes."""
    return f"pillow {pillow_version}, libjpeg {features.version('libjpeg_turbo')}"


def scale_down(sample: Sample, short_side: int) -> Sample:
    """The sample with its image scaled to that short side and its boxes along; itself if smaller.

    Upright and without its EXIF block; PNG stays PNG, everything else becomes JPEG of quality 95.
    Where that does not save bytes the sample stays as it is.
    """
    scale = short_side / min(sample.width, sample.height)
    if scale >= 1:
        return sample
    width, height = (max(1, round(side * scale)) for side in (sample.width, sample.height))
    image = decode_image(sample.image).resize((width, height), Image.Resampling.LANCZOS)
    buffer = BytesIO()
    if sample.extension == "png":
        image.save(buffer, "PNG")
    else:
        image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    if buffer.tell() >= len(sample.image):
        return sample
    factors = np.array([width / sample.width, height / sample.height] * 2)
    return replace(
        sample,
        image=buffer.getvalue(),
        extension="png" if sample.extension == "png" else "jpg",
        width=width,
        height=height,
        boxes=(sample.boxes * factors).astype(np.float32),
    )
