"""What an exception says of its cause: the code with which a rank ends, and a name that equal faults share."""

import errno
import hashlib
import re
import sys
import traceback
from pathlib import PurePath

from orchestrate.errors import OrchestrateError
from orchestrate.exits import Exit

# torch's own kinds, by name: naming the classes would import torch.
_MEMORY_KINDS = frozenset({"OutOfMemoryError", "MemoryError"})
_DISTRIBUTED_KINDS = frozenset({"DistError"})
_MEMORY = re.compile(r"can't allocate memory|out of memory|std::bad_alloc|Cannot allocate memory", re.IGNORECASE)
# gloo raises plain RuntimeError; so does NCCL where its watchdog has ended a communicator.
_PEER_LOST = re.compile(
    r"Connection (?:closed|reset|refused)(?: by)? ?(?:peer)?|gloo/transport|Broken pipe|closed by remote peer"
    r"|Timed out waiting \d+ms for|Application timeout caused pair closure|Read timeout \["
    r"|nccl(?:Remote|System|Internal)Error|NCCL communicator was aborted|Connection was likely closed"
)
_VARIES = re.compile(r"0x[0-9a-fA-F]+|(?:/[\w.@+-]+)+|\d+")


def exit_code_of(error: BaseException) -> int:
    """Return the code with which a rank ends because of an exception."""
    if isinstance(error, OrchestrateError):
        return error.exit_code
    seen: BaseException | None = error
    while seen is not None:
        kinds = {kind.__name__ for kind in type(seen).__mro__}
        if kinds & _MEMORY_KINDS or _is_out_of_memory(seen):
            return Exit.OUT_OF_MEMORY
        if kinds & _DISTRIBUTED_KINDS or isinstance(seen, ConnectionError) or _is_broken_link(seen):
            return Exit.PEER_LOST
        seen = seen.__cause__
    return Exit.USER_ERROR


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and bool(_MEMORY.search(str(error)))


def _is_broken_link(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and bool(_PEER_LOST.search(str(error)))


def in_a_line(error: BaseException) -> str:
    """Return an exception in one line, as the last of its traceback."""
    text = " ".join(str(error).split())
    shown = text if isinstance(error, OrchestrateError) else f"{type(error).__name__}: {text}"
    return shown if len(shown) <= 500 else f"{shown[:500]} ..."


def fault_name(error: BaseException) -> str:
    """Return 16 hex digits that the same fault gives on every node, at every step and from every copy of the code."""
    frames = traceback.extract_tb(error.__traceback__)
    places = [f"{_below_search_path(frame.filename)}:{frame.name}" for frame in frames]
    message = _VARIES.sub("_", in_a_line(error))
    return hashlib.sha256("\n".join([*places, message]).encode()).hexdigest()[:16]


def _below_search_path(filename: str) -> str:
    """Return a file as imports see it, without the folder that it was found in."""
    path = PurePath(filename)
    folders = [PurePath(folder) for folder in sys.path if folder and path.is_relative_to(folder)]
    longest = max(folders, key=lambda folder: len(folder.parts), default=None)
    return str(path.relative_to(longest)) if longest else path.name
