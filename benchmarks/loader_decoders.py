"""CPU milliseconds of decoding one image: ours, PIL's, or undoing the entropy coding alone, the floor of all decoders.

    python benchmarks/loader_decoders.py ours|pillow|entropy TAR SECONDS

All three are measured alike, on the first images of one tar. `entropy` calls `jpeg_read_coefficients` of the
libjpeg-turbo inside Pillow's wheel. Each is a process of its own, because libjpeg ends the process on an error, such as
a library of another layout than the one below.
"""

from __future__ import annotations

import ctypes
import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import PIL
from loader_contestants import opened
from loader_rows import cpu_ms

from orchestrate.data.images import decode

_VERSION, _DECOMPRESS_BYTES = 62, 632  # JPEG_LIB_VERSION and sizeof(jpeg_decompress_struct) of that build, 64 bits
_ROOM = 4096  # more than any of its structs takes


class EntropyDecoder:
    """Decode the coefficients of JPEGs; leaves out their transform, upsampling and colours."""

    def __init__(self) -> None:
        folder = Path(PIL.__file__).parent.parent / "pillow.libs"
        self._library = ctypes.CDLL(str(next(folder.glob("libjpeg*"))))
        self._library.jpeg_std_error.restype = ctypes.c_void_p
        self._library.jpeg_read_coefficients.restype = ctypes.c_void_p
        self._state, self._errors = ctypes.create_string_buffer(_ROOM), ctypes.create_string_buffer(_ROOM)
        # The first field of the state is a pointer to the error manager.
        ctypes.cast(self._state, ctypes.POINTER(ctypes.c_void_p))[0] = self._library.jpeg_std_error(self._errors)
        self._library.jpeg_CreateDecompress(self._state, _VERSION, ctypes.c_size_t(_DECOMPRESS_BYTES))

    def decode(self, data: bytes) -> None:
        """Decode the coefficients of one image and drop them."""
        self._library.jpeg_mem_src(self._state, data, ctypes.c_ulong(len(data)))
        self._library.jpeg_read_header(self._state, 1)
        self._library.jpeg_read_coefficients(self._state)
        self._library.jpeg_finish_decompress(self._state)


def main() -> None:
    """Measure and print."""
    name, tar_path, seconds = sys.argv[1:]
    with tarfile.open(tar_path) as tar:
        members = [member for member in tar if member.name.endswith((".jpg", ".png"))][:64]
        files = [file.read() for member in members if (file := tar.extractfile(member))]
    work = _DECODERS[name]()
    for data in files:  # caches and pages that are first touched are not what we measure
        work(data)
    print(json.dumps(cpu_ms(lambda number: work(files[number % len(files)]), float(seconds))))


_DECODERS: dict[str, Callable[[], Callable[[bytes], object]]] = {
    "ours": lambda: decode,
    "pillow": lambda: opened,
    "entropy": lambda: EntropyDecoder().decode,
}

if __name__ == "__main__":
    main()
