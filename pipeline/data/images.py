"""Encoded images to pixels, as people see them; the one decoder of the program.

Ordinary JPEG files go through simplejpeg, which hands over RGB rows without Pillow's padding byte
and copies, at 1.3 to 1.5 times its rate; everything else, and whatever simplejpeg finds odd, is
for Pillow to read or to refuse. Both contain libjpeg-turbo and give the same pixels.
"""

import logging
import multiprocessing
import struct
import zlib
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL import __version__ as pillow_version

from pipeline.errors import DataError

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

logger = logging.getLogger(__name__)

MAX_PIXELS = 64 * 1024 * 1024
"""A 388 KB file can hold 400 million pixels, so the header is asked before anything is decoded."""

EXTENSIONS = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "GIF": "gif",
    "BMP": "bmp",
}
"""Formats that are read, by Pillow's name, with the file extension that each is stored under."""

# Pillow opens a multi-picture file as JPEG and calls it MPO afterwards.
_OPENED_AS = [name for name in EXTENSIONS if name != "MPO"]
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTED = (b"Exif\0", b"http://ns.adobe.com/xap/")
"""Beginnings of the blocks of a JPEG in which Pillow looks for an orientation."""
_PLAIN = {("YCbCr", sampling) for sampling in ("444", "422", "420")} | {("Gray", "Gray")}
"""Colours and chroma sampling, as simplejpeg names them, of an ordinary JPEG."""
# What Pillow's parsers raise on damaged files, beyond OSError.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    ArithmeticError,
    LookupError,
    TypeError,
    AttributeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def decode_pixels(data: bytes) -> NDArray[np.uint8]:
    """An image as people see it, (H, W, 3) RGB, in memory of its own.

    EXIF orientation is applied; 16-bit samples keep their high byte; transparent pixels stand on
    white; of an animation the first frame counts. Colour profiles are not applied. Raises
    `DataError` for what is no image, is cut short, or has more than `MAX_PIXELS` pixels.
    """
    pixels = _decode_plain_jpeg(data)
    return np.array(_decode_with_pillow(data)) if pixels is None else pixels


def decode_image(data: bytes) -> Image.Image:
    """The same as an RGB image; raises `DataError` as `decode_pixels` does."""
    pixels = _decode_plain_jpeg(data)
    return _decode_with_pillow(data) if pixels is None else Image.fromarray(pixels)


@cache
def decoder_name() -> str:
    """The decoder of ordinary JPEG files with its version, for records of a run.

    Another one, or another version, may differ by a level here and there. Warns, once, where the
    fast one is not installed.
    """
    if simplejpeg is not None:
        return f"simplejpeg {simplejpeg.__version__}"
    if multiprocessing.parent_process() is None:
        logger.warning(
            "simplejpeg is not installed, so Pillow decodes JPEG files, at two thirds of the rate; "
            "pip install simplejpeg"
        )
    return f"pillow {pillow_version}"


def read_image(path: Path) -> Image.Image:
    """The image in a file, as `decode_image` gives it; raises `DataError`, also without a file."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"the file cannot be read ({error.strerror or error})") from error
    return decode_image(data)


def to_rgb(image: Image.Image) -> Image.Image:
    """An opened image in RGB as `decode_image` makes it, its EXIF orientation not applied.

    Raises `DataError` for one that is damaged or cut short.
    """
    try:
        image.load()
        return _to_rgb(image)
    except _DAMAGE as error:
        raise DataError(f"the image is damaged or cut short ({_reason(error)})") from None


def image_size(data: bytes) -> tuple[int, int]:
    """(width, height) as people see it, from the header; raises `DataError` as `decode_image`."""
    image = _open(data)
    width, height = image.size
    return (height, width) if orientation_of(data) >= 5 else (width, height)


def image_extension(data: bytes) -> str:
    """File extension of the format that the bytes are in; raises `DataError`."""
    return EXTENSIONS[str(_open(data).format)]


def orientation_of(data: bytes) -> int:
    """EXIF orientation, 1 to 8; 1 where none is given or the EXIF block is damaged."""
    image = _open(data)
    if image.format == "PNG" and b"eXIf" in data:
        # A PNG may hold its EXIF block after the pixels.
        try:
            image.load()
        except _DAMAGE:
            return 1
    return _orientation(image)


def _decode_plain_jpeg(data: bytes) -> NDArray[np.uint8] | None:
    """The pixels of an ordinary, undamaged JPEG; None for all that Pillow has to judge."""
    decoder_name()
    if simplejpeg is None or not data.startswith(b"\xff\xd8\xff"):
        return None
    try:
        height, width, colours, sampling = simplejpeg.decode_jpeg_header(data)
        if (colours, sampling) not in _PLAIN or not 0 < width * height <= MAX_PIXELS:
            return None
        # They stand before the first scan; what is in a thumbnail's block is found in its place.
        head = data[: data.find(b"\xff\xda")]
        if any(block in head for block in _ORIENTED) and orientation_of(data) != 1:
            return None
        # Strict, by default: libjpeg's warnings (premature end, corrupt data) are errors.
        return cast(NDArray[np.uint8], simplejpeg.decode_jpeg(data, "RGB"))
    except (ValueError, RuntimeError):
        return None


def _decode_with_pillow(data: bytes) -> Image.Image:
    image = _open(data)
    upright = to_rgb(image)
    turn = _TURNS.get(_orientation(image))
    return upright if turn is None else upright.transpose(turn)


def _open(data: bytes) -> Image.Image:
    """Header only."""
    if not data:
        raise DataError("the image file is empty")
    try:
        image = Image.open(BytesIO(data), formats=_OPENED_AS)
    except UnidentifiedImageError:
        known = ", ".join(_OPENED_AS)
        raise DataError(f"not an image of a known format ({known})") from None
    except Image.DecompressionBombError:
        raise DataError(f"the image has more than {MAX_PIXELS} pixels; scale it down") from None
    except _DAMAGE as error:
        raise DataError(f"the image header is damaged ({_reason(error)})") from None
    width, height = image.size
    if width < 1 or height < 1:
        raise DataError(f"the image has no pixels ({width}x{height})")
    if width * height > MAX_PIXELS:
        raise DataError(
            f"the image has {width}x{height} pixels, more than {MAX_PIXELS}; scale it down"
        )
    return image


def _orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except _DAMAGE:
        return 1
    return orientation if orientation in _TURNS else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow's own conversion clips 16-bit grey to white instead of scaling it.
        samples = np.asarray(image).astype(np.int64)
        image = Image.fromarray((np.clip(samples, 0, 65535) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
