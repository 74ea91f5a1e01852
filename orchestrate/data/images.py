"""Image bytes: which files count as images, strict checking, decoding, and a PNG that is the same everywhere."""

from __future__ import annotations

import io
import math
import struct
import zlib

import numpy as np
import numpy.typing as npt
import simplejpeg
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
# Modes I, I;16 and its kin, F: converting them to RGB clips values above 255 to white without a word.
_DEEP_MODES = ("I", "F")
# Colour spaces of print, as simplejpeg names them; Pillow knows how to turn them to RGB.
_INK_COLOURS = ("CMYK", "YCCK")
# What PIL raises on damaged bytes, which depends on the format and on where the damage is. Not MemoryError: that says
# nothing about the image.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error,
                 Image.DecompressionBombError)  # fmt: skip


def check_image(data: bytes) -> str | None:
    """Decode an image once, strictly and with the format's own checksums; say what is wrong with it, or None."""
    try:
        if not _is_jpeg(data):
            with Image.open(io.BytesIO(data)) as image:
                image.verify()
        decode(data)
    except UnidentifiedImageError:
        return "not an image" if data else "empty file"
    except DECODE_ERRORS as error:
        return f"cannot be decoded: {error}"
    return None


def decode(data: bytes) -> UInt8[np.ndarray, "height width channels"]:
    """Decode to one channel (grey images) or three (all others), as a writable array.

    JPEGs are decoded strictly: damage that the decoder could paper over is an error. So are levels of more than 8 bits,
    unless Pillow itself scales them down (as it does those of colour PNGs). Raises one of DECODE_ERRORS.
    """
    return _decode_jpeg(data) if _is_jpeg(data) else _decode_with_pillow(data)


def _is_jpeg(data: bytes) -> bool:
    return data[:3] == b"\xff\xd8\xff"


def _decode_jpeg(data: bytes) -> UInt8[np.ndarray, "height width channels"]:
    height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    if colours in _INK_COLOURS:
        return _decode_with_pillow(data)
    if height * width > 2 * (Image.MAX_IMAGE_PIXELS or math.inf):  # Pillow's own limit
        raise Image.DecompressionBombError(f"{width} x {height} pixels, more than any photograph")
    pixels: UInt8[np.ndarray, "_ _ _"] = simplejpeg.decode_jpeg(data, "GRAY" if colours == "Gray" else "RGB")
    return pixels


def _decode_with_pillow(data: bytes) -> UInt8[np.ndarray, "height width channels"]:
    with Image.open(io.BytesIO(data)) as image:
        if image.mode.partition(";")[0] in _DEEP_MODES:
            raise ValueError(f"more than 8 bits per channel (mode {image.mode}); convert it to 8 bits")
        plain = image if image.mode in ("L", "RGB") else image.convert("RGB")
        levels = bytearray(plain.tobytes())  # loads the image; np.array would take longer and copy once more
    return np.frombuffer(levels, np.uint8).reshape(plain.height, plain.width, -1)


def grey_png(pixels: npt.NDArray[np.uint8]) -> bytes:
    """Encode a (height, width) grey image as PNG without compression.

    Compressed bytes differ between versions of zlib, and with them the dataset's digest; stored blocks never do. Small
    images pay at most one tar block for it.
    """
    height, width = pixels.shape
    rows = np.zeros((height, width + 1), dtype=np.uint8)  # each row begins with its filter: 0, none
    rows[:, 1:] = pixels
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", _stored(rows.tobytes())) + _chunk(b"IEND")


def _chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _stored(data: bytes) -> bytes:
    """Wrap bytes as a zlib stream of stored blocks (RFC 1950, RFC 1951 section 3.2.4)."""
    blocks = [data[start : start + 0xFFFF] for start in range(0, len(data), 0xFFFF)]
    framed = [
        struct.pack("<BHH", number == len(blocks), len(block), len(block) ^ 0xFFFF) + block
        for number, block in enumerate(blocks, start=1)
    ]
    return b"\x78\x01" + b"".join(framed) + struct.pack(">I", zlib.adler32(data))
