import errno
import hashlib
import os
import resource
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from orchestrate.engine.tensor_file import write_tensors

TYPES = (
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
)


def every_type() -> dict[str, Tensor]:
    numbers = torch.arange(6).reshape(2, 3)
    tensors = {f"of {dtype}": numbers.to(dtype) for dtype in TYPES}
    odd = {"0-dim": torch.tensor(3.5), "empty": torch.zeros(0, 4), '["a.b", "é"]': torch.ones(5)}
    return tensors | odd | {"0-dim bool": torch.tensor(True)}


def test_file_is_the_one_that_safetensors_writes(tmp_path: Path) -> None:
    for tensors in ({}, every_type()):
        write_tensors(tmp_path / "file", tensors)
        assert (tmp_path / "file").read_bytes() == safetensors.torch.save(tensors)


def test_order_of_names_does_not_change_the_bytes(tmp_path: Path) -> None:
    tensors = every_type()
    first = write_tensors(tmp_path / "first", tensors)
    assert write_tensors(tmp_path / "second", dict(reversed(tensors.items()))) == first


def test_size_and_hash_are_those_of_the_file(tmp_path: Path) -> None:
    # More than one chunk, and no multiple of one.
    facts = write_tensors(tmp_path / "file", {"long": torch.arange(3_000_001)})
    data = (tmp_path / "file").read_bytes()
    assert facts == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_full_disk_is_an_error(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
            write_tensors(tmp_path / "file", {"large": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
