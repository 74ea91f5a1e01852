import io
import zlib

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from orchestrate.data.images import DECODE_ERRORS, check_image, decode, grey_png


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))

TEXTURE = Image.fromarray(
    (np.add.outer(np.arange(200), np.arange(300))[:, :, None] * [1, 2, 3] // 4 % 256).astype(np.uint8)
)


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
    ("kind", "levels"),
    [
        ("PNG", np.uint16),
        ("TIFF", np.uint16),
        ("TIFF", np.dtype(">u2")),
        ("TIFF", np.int32),
        ("TIFF", np.float32),
        ("PPM", np.uint16),
    ],
)
def test_images_of_more_than_8_bits_are_refused_rather_than_made_white(kind: str, levels: npt.DTypeLike) -> None:
    data = encoded(Image.fromarray(np.arange(300, 1500, dtype=levels).reshape(30, 40)), kind)
    with pytest.raises(DECODE_ERRORS, match=r"more than 8 bits per channel \(mode [IF][^)]*\); convert it to 8 bits"):
        decode(data)
    assert "more than 8 bits per channel" in str(check_image(data))


def test_lack_of_memory_says_nothing_about_an_image() -> None:
    assert not any(issubclass(MemoryError, error) for error in DECODE_ERRORS)


def test_damaged_jpegs_are_named() -> None:
    data = encoded(TEXTURE, "JPEG", quality=90)
    zeroed = [data[:place] + bytes(400) + data[place + 400 :] for place in range(700, len(data) - 500, 200)]
    assert len(zeroed) > 10
    assert [number for number, damaged in enumerate(zeroed) if check_image(damaged) is None] == []
    # Pillow, which many loaders use, takes most of them as they are.
    assert sum(pillow_accepts(damaged) for damaged in zeroed) > len(zeroed) / 2


def pillow_accepts(data: bytes) -> bool:
    try:
        Image.open(io.BytesIO(data)).load()
    except DECODE_ERRORS:
        return False
    return True


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("PNG", mode) for mode in ("L", "RGB", "1", "P", "RGBA", "LA")]
    + [("JPEG", mode) for mode in ("L", "RGB", "CMYK")]
    + [("WEBP", mode) for mode in ("RGB", "RGBA")]
    + [("BMP", mode) for mode in ("L", "RGB", "1", "P")],
)
def test_decoded_images_have_one_channel_or_three(kind: str, mode: str) -> None:
    data = encoded(PHOTO.convert(mode), kind)
    pixels = decode(data)
    with Image.open(io.BytesIO(data)) as image:
        channels = 1 if image.mode == "L" else 3
        expected = np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB"))
    assert (pixels.shape, pixels.dtype, pixels.flags.writeable) == ((40, 30, channels), np.uint8, True)
    # two builds of libjpeg-turbo may differ by a level
    assert np.abs(pixels.astype(int) - expected.reshape(40, 30, channels)).max() <= (1 if kind == "JPEG" else 0)


@pytest.mark.parametrize("options", [{"subsampling": 0}, {"subsampling": 2}, {"progressive": True}, {"quality": 100}])
def test_jpegs_decode_as_in_pillow(options: dict[str, int]) -> None:
    data = encoded(TEXTURE, "JPEG", **options)
    assert np.abs(decode(data).astype(int) - np.asarray(Image.open(io.BytesIO(data)))).max() <= 1


def test_damage_raises_a_decode_error() -> None:
    for kind in ("PNG", "JPEG"):
        with pytest.raises(DECODE_ERRORS):
            decode(encoded(PHOTO, kind)[:-100])
    with pytest.raises(DECODE_ERRORS):
        decode(b"")


def test_jpeg_that_claims_to_be_enormous_is_refused() -> None:
    data = bytearray(encoded(PHOTO, "JPEG"))
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = b"\xff\xdc" * 2  # height and width: 65,500
    assert "65500 x 65500 pixels" in str(check_image(bytes(data)))


def test_png_that_claims_to_be_enormous_is_refused() -> None:
    data = encoded(PHOTO, "PNG")
    header = b"IHDR" + b"\x00\x00\xff\xdc" * 2 + data[24:29]
    claims = data[:12] + header + zlib.crc32(header).to_bytes(4, "big") + data[33:]
    assert "decompression bomb" in str(check_image(claims))
    with pytest.raises(DECODE_ERRORS, match="decompression bomb"):
        decode(claims)
