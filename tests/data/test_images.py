import logging
import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.data import images
from pipeline.data.images import (
    MAX_PIXELS,
    decode_image,
    decode_pixels,
    image_extension,
    image_size,
)
from pipeline.errors import DataError

RAMP = np.tile(np.linspace(0, 255, 48, dtype=np.uint8), (32, 1))


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def pixels(data: bytes) -> np.ndarray:
    image = decode_image(data)
    assert image.mode == "RGB"
    assert image_size(data) == image.size
    return np.asarray(image)


def png_chunk(kind: bytes, content: bytes) -> bytes:
    body = kind + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


def png(header: tuple[int, ...], raw: bytes) -> bytes:
    """A PNG made by hand: width, height, bit depth, colour type; filtered rows."""
    chunks = [
        png_chunk(b"IHDR", struct.pack(">IIBBBBB", *header, 0, 0, 0)),
        png_chunk(b"IDAT", zlib.compress(raw)),
        png_chunk(b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def png_16(samples: np.ndarray, colour_type: int) -> bytes:
    """16 bits a sample, which Pillow does not write in colour."""
    height, width = samples.shape[:2]
    rows = samples.astype(">u2").reshape(height, -1)
    return png((width, height, 16, colour_type), b"".join(b"\0" + row.tobytes() for row in rows))


def test_16_bit_samples_are_scaled_not_clipped() -> None:
    samples = np.linspace(0, 65535, 48 * 32).reshape(32, 48).astype(np.uint16)
    grey = pixels(png_16(samples, 0))
    assert np.array_equal(grey, np.repeat((samples >> 8)[..., None], 3, axis=2))
    colour = pixels(png_16(np.stack([samples, samples[::-1], samples[:, ::-1]], axis=-1), 2))
    assert np.abs(colour[..., 0].astype(int) - (samples >> 8)).max() <= 1


def test_grey_one_bit_and_cmyk() -> None:
    grey = pixels(encoded(Image.fromarray(RAMP)))
    assert np.array_equal(grey, np.repeat(RAMP[..., None], 3, axis=2))
    one_bit = pixels(encoded(Image.fromarray(RAMP).convert("1", dither=Image.Dither.NONE)))
    assert set(np.unique(one_bit)) == {0, 255}
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red_pixels = pixels(encoded(red, "JPEG", quality=95))
    assert np.abs(red_pixels.astype(int) - [255, 0, 0]).max() < 12


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P", "tRNS"])
def test_transparent_pixels_stand_on_white(mode: str) -> None:
    if mode == "tRNS":
        # A black picture whose black is declared transparent.
        data = encoded(Image.new("RGB", (8, 8), (0, 0, 0)), transparency=(0, 0, 0))
        assert (pixels(data) == 255).all()
        return
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((10, 10, 10, 255), (4, 0, 8, 8))
    data = encoded(image, "GIF") if mode == "P" else encoded(image.convert(mode))
    got = pixels(data)
    assert (got[:, :4] == 255).all()
    assert np.abs(got[:, 4:].astype(int) - 10).max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_exif_orientation_is_applied(orientation: int, format: str) -> None:
    upright = np.zeros((24, 40, 3), dtype=np.uint8)
    upright[:8, :16] = (255, 0, 0)
    upright[16:, :] = (0, 0, 255)
    # What a camera stores, by the EXIF standard's table of where row 0 and column 0 are.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95, "subsampling": 0} if format == "JPEG" else {"lossless": True}
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), format, exif=exif, **options)
    assert np.abs(pixels(data).astype(int) - upright).max() < 60
    assert image_size(data) == (40, 24)


def test_extension_is_of_the_bytes() -> None:
    image = Image.fromarray(RAMP)
    for format, extension in [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("GIF", "gif")]:
        assert image_extension(encoded(image, format)) == extension
    # What some phones write: several JPEGs in one file, of which the first is the photograph.
    several = encoded(image, "MPO", save_all=True, append_images=[image.resize((4, 4))])
    assert Image.open(BytesIO(several)).format == "MPO"
    assert image_extension(several) == "jpg" and image_size(several) == (48, 32)
    assert pixels(several).shape == (32, 48, 3)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"<html>404</html>" * 50, "not an image"),
        (encoded(Image.fromarray(RAMP), "TIFF"), "known format"),
        (encoded(Image.fromarray(RAMP), "JPEG")[:300], "damaged"),
        (encoded(Image.fromarray(RAMP))[:-40], "damaged or cut short"),
    ],
)
def test_what_is_no_whole_image_is_a_data_error(data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        decode_image(data)


def test_huge_images_are_refused_by_their_header() -> None:
    with pytest.raises(DataError, match=str(MAX_PIXELS)):
        decode_image(png((40000, 40000, 8, 2), b""))
    side = int(MAX_PIXELS**0.5)
    assert image_size(encoded(Image.new("1", (side, side)))) == (side, side)
    with pytest.raises(DataError, match=str(MAX_PIXELS)):
        image_size(encoded(Image.new("1", (side + 1, side))))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damage_never_raises_anything_else(data: st.DataObject) -> None:
    format = data.draw(st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP"]))
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif} if format in ("JPEG", "PNG", "WEBP") else {}
    content = bytearray(encoded(Image.fromarray(RAMP), format, **options))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)))
    damaged = bytes(content[:cut] if data.draw(st.booleans()) else content)
    for function in (decode_image, image_size, image_extension):
        try:
            function(damaged)
        except DataError:
            pass


def test_every_truncation_of_a_jpeg_is_noticed() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    whole = encoded(Image.fromarray(noise), "JPEG", quality=90)
    for length in range(0, len(whole) - 64, 101):
        with pytest.raises(DataError):
            decode_image(whole[:length])


def test_real_truncated_photographs(shared_data: Path) -> None:
    files = sorted((shared_data / "broken").glob("*.jpg"))
    assert len(files) == 2
    for file in files:
        with pytest.raises(DataError, match="damaged or cut short"):
            decode_image(file.read_bytes())
        assert min(image_size(file.read_bytes())) > 100


def by_both(data: bytes) -> tuple[object, object]:
    """What `decode_pixels` and Pillow alone make of the bytes: pixels, or that they refuse."""

    def outcome(decode: Callable[[bytes], object]) -> object:
        try:
            return np.asarray(decode(data)).tolist()
        except DataError:
            return "refused"

    return outcome(decode_pixels), outcome(images._decode_with_pillow)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_the_fast_decoder_gives_what_pillow_gives(mode: str, progressive: bool) -> None:
    pytest.importorskip("simplejpeg")
    rng = np.random.default_rng(0)
    for size in ((60, 40), (1, 1), (7, 3), (17, 33)):
        noise = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        smooth = Image.fromarray(noise).resize(size).convert(mode)
        for subsampling in range(3 if mode == "RGB" else 1):
            options = {"quality": 85, "progressive": progressive, "subsampling": subsampling}
            data = encoded(smooth, "JPEG", **options)
            fast = images._decode_plain_jpeg(data)
            assert (fast is None) == (mode == "CMYK")
            ours, theirs = by_both(data)
            assert ours == theirs != "refused"


@pytest.mark.parametrize("progressive", [False, True])
def test_the_fast_decoder_refuses_what_pillow_refuses(progressive: bool) -> None:
    pytest.importorskip("simplejpeg")
    rng = np.random.default_rng(1)
    whole = encoded(Image.fromarray(RAMP).convert("RGB"), "JPEG", progressive=progressive)
    for length in range(len(whole)):
        assert images._decode_plain_jpeg(whole[:length]) is None
    for _ in range(400):
        damaged = bytearray(whole)
        damaged[rng.integers(len(damaged))] = rng.integers(256)
        ours, theirs = by_both(bytes(damaged))
        assert ours == theirs


def test_decoded_pixels_are_writable_and_their_own() -> None:
    for format in ("JPEG", "PNG"):
        data = encoded(Image.fromarray(RAMP), format)
        found = decode_pixels(data)
        assert found.shape == (32, 48, 3) and found.flags.writeable
        found[:] = 0
        assert decode_pixels(data).any()


def test_real_photographs_are_the_same_by_both_decoders(shared_data: Path) -> None:
    for path in sorted((shared_data / "coco128" / "train2017").glob("*.jpg"))[:12]:
        ours, theirs = by_both(path.read_bytes())
        assert ours == theirs != "refused"


def test_without_the_fast_decoder_pillow_is_used_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    data = encoded(Image.fromarray(RAMP), "JPEG")
    expected = decode_pixels(data)
    monkeypatch.setattr(images, "simplejpeg", None)
    images.decoder_name.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                assert np.array_equal(decode_pixels(data), expected)
        assert caplog.text.count("simplejpeg is not installed") == 1
        assert images.decoder_name().startswith("pillow ")
    finally:
        images.decoder_name.cache_clear()
