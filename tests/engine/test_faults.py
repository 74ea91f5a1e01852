"""What exceptions mean, and that equal faults have equal names."""

import errno
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from orchestrate.engine.faults import exit_code_of, fault_name, in_a_line
from orchestrate.errors import BusyError, DataError, DivergedError, PreflightError, StorageError

REMOTE = "NCCL error in: x.cpp:1, remote process exited or there was a network error\nncclRemoteError: A call failed"
CLOSED = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3141"


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("x"), 1),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), 1),
        (KeyError("Connection"), 1),
        (OSError(errno.ENOSPC, "No space left on device"), 1),
        (DataError("x"), 2),
        (StorageError("x"), 74),
        (BusyError("x"), 74),
        (PreflightError("x"), 87),
        (DivergedError("x"), 88),
        (dist.DistBackendError(REMOTE), 76),
        (dist.DistNetworkError("recvValue failed"), 76),
        (dist.DistStoreError("Timed out after 31 seconds waiting for clients. 1/2 clients joined."), 76),
        (RuntimeError(CLOSED), 76),
        (RuntimeError("Timed out waiting 1800000ms for recv operation to complete"), 76),
        (ConnectionResetError(104, "Connection reset by peer"), 76),
        (caused(RuntimeError("the step failed"), RuntimeError(CLOSED)), 76),
        (MemoryError(), 89),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), 89),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried"), 89),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 89),
        (dist.DistBackendError("ncclUnhandledCudaError: Cuda failure 2 'out of memory'"), 89),
    ],
)
def test_code_of_an_exception_says_whose_fault_it_is(error: Exception, code: int) -> None:
    assert exit_code_of(error) == code


# Two ranks join; one dies in the middle of a collective, the other says with which code it would end.
PEER = """
import sys
import torch, torch.distributed as dist
from orchestrate.engine.faults import exit_code_of
store, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
dist.all_reduce(torch.ones(1))
if rank == 1:
    import os; os._exit(9)
try:
    for _ in range(100): dist.all_reduce(torch.ones(1))
except Exception as error:
    print(exit_code_of(error), error)
"""


def test_rank_whose_peer_died_says_so(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PEER, str(tmp_path / "store"), str(rank)], stdout=subprocess.PIPE, text=True
        )
        for rank in (0, 1)
    ]
    said, _ = ranks[0].communicate(timeout=60)
    ranks[1].wait(timeout=60)
    assert said.startswith("76 "), said


def raised(step: int, path: str, *, elsewhere: bool = False) -> Exception:
    def fail() -> None:
        raise ValueError(f"step {step}: {path} at 0x7f{step:04x} is no good")

    def fail_there() -> None:
        raise ValueError(f"step {step}: {path} at 0x7f{step:04x} is no good")

    try:
        fail_there() if elsewhere else fail()
    except ValueError as error:
        return error
    raise AssertionError


def test_same_fault_has_the_same_name_at_any_step_and_path() -> None:
    name = fault_name(raised(3, "/data/a.tar"))
    assert re.fullmatch("[0-9a-f]{16}", name)
    assert fault_name(raised(4711, "/scratch/b.tar")) == name
    assert fault_name(raised(3, "/data/a.tar", elsewhere=True)) != name
    assert fault_name(KeyError("x")) != fault_name(ValueError("x"))


def test_copy_of_the_code_in_another_folder_gives_the_same_name(tmp_path: Path) -> None:
    names = set()
    for folder, blank in (("one", ""), ("other/deeper", "\n\n")):
        package = tmp_path / folder
        package.mkdir(parents=True)
        (package / "faulty.py").write_text(f"{blank}def fail(): raise ValueError('x')\n")
        code = "import faulty\nfrom orchestrate.engine.faults import fault_name\ntry: faulty.fail()\n"
        code += "except ValueError as error: print(fault_name(error))"
        command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(package)!r})\n{code}"]
        names.add(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert len(names) == 1


def test_long_message_becomes_one_line() -> None:
    line = in_a_line(RuntimeError("a\n" * 1000))
    assert line.startswith("RuntimeError: a a")
    assert len(line) < 520
    assert in_a_line(DataError("x.tar: is empty")) == "x.tar: is empty"
