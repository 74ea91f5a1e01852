"""Headers of a tar: names of members as stock webdataset reads them, fast for plain ones, by `tarfile` for the rest."""

from __future__ import annotations

import io
import re
import tarfile

BLOCK = 512
# What `tarfile` and webdataset count as a file: the type of POSIX, that of old Unix, and "contiguous".
_PLAIN_TYPES = (b"0", b"\0")
# Headers that describe the next member: pax, pax of Solaris, pax for all members, long name and long link of GNU.
EXTENSION_TYPES = (b"x", b"X", b"g", b"L", b"K")
# Stock readers keep key and URL of a sample beside its members, so a member of that name is a second one.
RESERVED_EXTENSIONS = frozenset({"__key__", "__url__"})
# Folders and members of such names hold notes about the shard; stock readers skip them.
_NOTE = re.compile(r"__[^/]*__($|/)")
# Names have thousands of bytes at most; a larger one is damage, and would be read into memory.
_LARGEST_EXTENSION = 1 << 20
# Set for all members, these would change how later ranges read that do not hold the global header.
_SPARSE = "a sparse file, whose bytes are not its contents; write the tar again without --sparse"
_PAX_FOR_ALL = {"path", "size", "hdrcharset"}


def padded(size: int) -> int:
    """Round a member's size up to whole blocks."""
    return size + -size % BLOCK


def plain_header(header: bytes) -> tuple[str, int] | None:
    """Read name and size from the header of a plain file; None for all else. `tarfile` takes ten times as long.

    The header's own checksum is not looked at.
    """
    if len(header) != BLOCK or header[156:157] not in _PLAIN_TYPES:
        return None
    name, prefix = header[:100].split(b"\0", 1)[0], header[345:500].split(b"\0", 1)[0]
    try:
        size = int(header[124:136].split(b"\0", 1)[0].strip() or b"0", 8)
    except ValueError:
        return None  # binary numbers of GNU, for members over 8 GiB, or damage
    if size < 0 or name.endswith(b"/"):
        return None
    full = prefix + b"/" + name if prefix else name
    return full.decode("utf-8", "surrogateescape"), size


def checksum_holds(header: bytes) -> bool:
    """Check a header by the sum of its bytes; some old programs summed signed ones, which `odd_header` accepts too."""
    try:
        stated = int(header[148:156].split(b"\0", 1)[0].strip() or b"0", 8)
    except ValueError:
        return False
    return stated == sum(header) - sum(header[148:156]) + 8 * ord(" ")


def odd_header(blocks: bytes) -> tarfile.TarInfo:
    """Read a member's header together with the extension headers before it.

    Raises:
        ValueError: damaged, or of a kind whose bytes are not the member's contents as they are (sparse files).
    """
    if b" GNU.sparse." in blocks[:-BLOCK]:  # of version 1.0 the map is in the contents, which are not here
        raise ValueError(_SPARSE)
    try:
        with tarfile.open(fileobj=io.BytesIO(blocks), mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
            info = tar.next()
            for_all = _PAX_FOR_ALL & set(tar.pax_headers)
    except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
        raise ValueError(f"not a tar header ({error}); stock readers stop there without a word") from error
    if info is None or info.offset_data != len(blocks) or info.size < 0:
        raise ValueError("not the header of one member")
    if info.issparse():
        raise ValueError(f"{info.name}: {_SPARSE}")
    if for_all:
        raise ValueError(f"a global pax header sets {', '.join(sorted(for_all))} for all members")
    return info


def holds_data(info: tarfile.TarInfo) -> bool:
    """Say whether contents follow a header: folders and links have none, whatever their size says."""
    return info.isreg() or info.type not in tarfile.SUPPORTED_TYPES


def extension_size(header: bytes) -> int | None:
    """Measure what follows an extension header, in bytes with padding; None for any other header.

    Raises:
        ValueError: damaged.
    """
    if header[156:157] not in EXTENSION_TYPES:
        return None
    size = int(header[124:136].split(b"\0", 1)[0].strip() or b"0", 8)
    if not 0 <= size <= _LARGEST_EXTENSION:
        raise ValueError(f"an extended header of {size} bytes")
    return padded(size)


def split_name(name: str) -> tuple[str, str] | None:
    """Split a member's name into key and extension as stock webdataset does; None for members that it skips.

    The key ends at the first dot of the base name; the extension is in lower case.
    """
    if name.startswith("__") and _NOTE.match(name):
        return None
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not stem or "\n" in name:
        return _split_as_stock(name)
    return (folder + slash + stem, extension.lower()) if dot else None


def _split_as_stock(name: str) -> tuple[str, str] | None:
    """Ask webdataset itself about names that begin with a dot, where its rule takes in the folder."""
    from webdataset.tariterators import base_plus_ext

    key, extension = base_plus_ext(name)
    return None if key is None else (key, extension.lower())
