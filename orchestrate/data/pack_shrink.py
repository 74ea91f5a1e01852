"""Make photographs smaller while packing: entropy decoding, which is by the byte, is most of a loader's work."""

from __future__ import annotations

import io
from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True)
class Shrink:
    """Scale an image down until its shorter side has `short_side` pixels, and encode it as JPEG of `quality` (1-95)."""

    short_side: int
    quality: int

    def __call__(self, data: bytes) -> bytes | None:
        """Return the smaller image; None for one that is small enough, which keeps its bytes and every pixel."""
        with Image.open(io.BytesIO(data)) as image:
            scale = self.short_side / min(image.size)
            if scale >= 1:
                return None
            width, height = (max(round(side * scale), self.short_side) for side in image.size)
            pixels = image if image.mode in ("L", "RGB") else image.convert("RGB")
            small = pixels.resize((width, height), Image.Resampling.LANCZOS)
        encoded = io.BytesIO()
        small.save(encoded, "JPEG", quality=self.quality)
        return encoded.getvalue()
