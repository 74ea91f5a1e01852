import io

import numpy as np
import pytest
from PIL import Image

from orchestrate.data.images import check_image, decode, grey_png


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))


@pytest.mark.parametrize("shape", [(1, 1), (28, 28), (300, 301)])  # 300 x 302 bytes need two stored blocks
def test_grey_png_holds_the_pixels(shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    data = grey_png(pixels)
    assert check_image(data) is None
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), pixels)


def test_grey_png_bytes_are_fixed_by_the_format() -> None:
    data = grey_png(np.array([[7]], dtype=np.uint8))
    assert data[41:].hex() == "7801010200fdff000700090008b9ac86870000000049454e44ae426082"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
def test_whole_images_pass(kind: str) -> None:
    assert check_image(encoded(PHOTO, kind)) is None


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_every_truncation_is_found(kind: str) -> None:
    data = encoded(PHOTO, kind)
    assert [length for length in range(0, len(data) - 2, 7) if check_image(data[:length]) is None] == []


def test_flipped_bits_in_png_are_found() -> None:
    data = encoded(PHOTO, "PNG")
    for place in range(40, len(data) - 20, 101):
        damaged = bytearray(data)
        damaged[place] ^= 4
        assert check_image(bytes(damaged)) is not None


def test_reasons_are_plain() -> None:
    assert check_image(b"") == "empty file"
    assert check_image(b"hello") == "not an image"
    deep = Image.fromarray(np.full((4, 4), 300, dtype=np.uint16))
    assert "more than 8 bits per channel" in str(check_image(encoded(deep, "PNG")))


@pytest.mark.parametrize(
    ("mode", "expected"), [("L", "L"), ("RGB", "RGB"), ("1", "RGB"), ("P", "RGB"), ("RGBA", "RGB")]
)
def test_decoded_images_are_grey_or_colour(mode: str, expected: str) -> None:
    assert decode(encoded(PHOTO.convert(mode), "PNG")).mode == expected


def test_ink_colours_are_converted() -> None:
    assert decode(encoded(PHOTO.convert("CMYK"), "JPEG")).mode == "RGB"
