"""Make a rank of a task: `srun python -m orchestrate.launchers.slurm_rank -- python -m orchestrate.worker RUN_DIR`.

Slurm's variables become those that workers know from every launcher, then the worker takes this process over. No
import here is heavy: a thousand ranks do this at once.
"""

import contextlib
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from orchestrate.exits import Exit

# Where ranks meet by other means, no variable of a surrounding job may say so.
_FOREIGN = ("ORCHESTRATE_RENDEZVOUS", "TORCHELASTIC_RUN_ID", "GROUP_RANK", "ROLE_RANK")
_WORKER = "orchestrate.worker"
# The kernel's own limit for a process, fs.nr_open, unless somebody changed it.
_MOST_FILES = 2**20


class RankError(Exception):
    """Say why a task cannot be a rank."""

    exit_code = Exit.BAD_INPUT


class NodeError(RankError):
    """Say that this node is not fit to run."""

    exit_code = Exit.PREFLIGHT
    check = "files"


class AddressError(NodeError):
    """Say that this node finds no way to rank 0's."""

    check = "address"


def rank_environment(environment: Mapping[str, str], *, address: Callable[[Mapping[str, str]], str]) -> dict[str, str]:
    """Return the whole environment of a rank.

    Args:
        environment: of the task.
        address: finds the address at which all ranks meet.

    Raises:
        RankError: a variable is missing, or rank 0 is not where the port was chosen.
    """
    rank, nodes = _number(environment, "SLURM_PROCID"), _number(environment, "SLURM_NNODES")
    node = environment.get("SLURMD_NODENAME") or socket.gethostname()
    main_node = environment.get("ORCHESTRATE_MAIN_NODE", node)
    if rank == 0 and node != main_node:
        reason = f"rank 0 is on {node}, but the port was chosen on {main_node}"
        raise RankError(f"{reason}; take options such as --relative or --distribution out of slurm.srun")
    mine = {
        "RANK": str(rank),
        "WORLD_SIZE": str(_number(environment, "SLURM_NTASKS")),
        "LOCAL_RANK": str(_number(environment, "SLURM_LOCALID")),
        "LOCAL_WORLD_SIZE": str(_local_ranks(environment)),
        "MASTER_ADDR": "127.0.0.1" if nodes == 1 else address(environment),
        "MASTER_PORT": _text(environment, "MASTER_PORT"),
        "ORCHESTRATE_NODE": node,
        "ORCHESTRATE_GPUS": environment.get("SLURM_STEP_GPUS") or environment.get("SLURM_JOB_GPUS", ""),
        "ORCHESTRATE_JOB": environment.get("ORCHESTRATE_JOB") or _text(environment, "SLURM_JOB_ID"),
    }
    if "GLOO_SOCKET_IFNAME" not in environment and (interface := gloo_interface(mine["MASTER_ADDR"], nodes=nodes)):
        mine["GLOO_SOCKET_IFNAME"] = interface
    kept = {key: value for key, value in environment.items() if key not in _FOREIGN}
    return kept | mine


def _text(environment: Mapping[str, str], name: str) -> str:
    value = environment.get(name)
    if not value:
        raise RankError(f"{name} is not set; start ranks with srun, from orchestrate.launchers.slurm_job")
    return value


def _number(environment: Mapping[str, str], name: str) -> int:
    text = _text(environment, name)
    if not text.isdigit():
        raise RankError(f"{name}: {text!r} is no number")
    return int(text)


def _local_ranks(environment: Mapping[str, str]) -> int:
    """Count the ranks of this node, of which SLURM_GTIDS names every one."""
    ranks = environment.get("SLURM_GTIDS", "")
    return len(ranks.split(",")) if ranks else _number(environment, "SLURM_NTASKS_PER_NODE")


def main_address(environment: Mapping[str, str]) -> str:
    """Find an address of rank 0's node that this node can use.

    Names of nodes need not be in the DNS, and may mean this host itself where they are written into /etc/hosts.

    Raises:
        AddressError: none of the ways to find it worked; says which were tried.
    """
    is_here = environment.get("SLURM_NODEID") == "0"
    name = environment.get("ORCHESTRATE_MAIN_NODE", "")
    tried = []
    for source, found in (
        (f"the node's name {name!r}", name),
        ("SLURM_LAUNCH_NODE_IPADDR", environment.get("SLURM_LAUNCH_NODE_IPADDR", "")),
        (f"NodeAddr of `scontrol show node {name}`", None),
    ):
        candidate = _node_address(name) if found is None else found
        problem = why_not(candidate, is_here=is_here)
        if not problem:
            return candidate
        tried.append(f"{source}: {problem}")
    raise AddressError(f"no address of rank 0's node can be used here; tried {'; '.join(tried)}")


def why_not(candidate: str, *, is_here: bool) -> str:
    """Say why an address of rank 0's node is of no use on this node; empty if it is of use.

    Args:
        candidate: a name or a number.
        is_here: whether rank 0 is on this node.
    """
    if not candidate:
        return "is not known"
    try:
        found = {str(each[4][0]) for each in socket.getaddrinfo(candidate, None, type=socket.SOCK_STREAM)}
    except OSError as error:
        return f"{candidate} does not resolve ({error.strerror or error})"
    is_number = candidate in found
    if not is_here and not is_number and all(_is_loopback(each) for each in found):
        return f"{candidate} means this node itself ({', '.join(sorted(found))})"
    return ""


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def _node_address(name: str) -> str:
    """Ask Slurm for a node's address; empty if it does not say, or if its commands are not here."""
    try:
        command = ("scontrol", "show", "node", name)
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
    found = [word.partition("=")[2] for word in said.split() if word.startswith("NodeAddr=")]
    return found[0] if found else ""


def gloo_interface(address: str, *, nodes: int) -> str:
    """Name the network interface by which gloo must talk; empty if it finds a good one by itself.

    Gloo takes the one of this host's name, which many hosts write down as a loopback address.
    """
    if nodes == 1:
        return "lo"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            own = socket.gethostbyname(socket.gethostname())
        except OSError:
            own = "127.0.0.1"
        if not _is_loopback(own):
            return ""
        try:
            probe.connect((address, 9))  # sends nothing; chooses the way
            way = probe.getsockname()[0]
        except OSError:
            return ""
        names = {_interface_address(probe, name): name for _, name in socket.if_nameindex()}
    return names.get(way, "")


def _interface_address(probe: socket.socket, name: str) -> str:
    import fcntl
    import struct

    request = struct.pack("256s", name.encode()[:15])
    try:
        answer = fcntl.ioctl(probe.fileno(), 0x8915, request)  # SIOCGIFADDR
    except OSError:
        return ""
    return socket.inet_ntoa(answer[20:24])


def check_files(words: Sequence[str], environment: Mapping[str, str]) -> None:
    """Refuse a node that does not see the trial, as where a file system is not mounted.

    On the first node the worker itself says so: whatever started this step has written there, so the trial is at fault.

    Raises:
        NodeError: there is no config.
    """
    if _WORKER not in words or environment.get("SLURM_NODEID") == "0":
        return
    config = _run_folder(words) / "run.yaml"
    try:
        config.stat()
    except OSError as error:
        reason = f"{config}: {error.strerror}, though rank 0's node has its folder"
        raise NodeError(f"{reason}; look whether its file system is mounted here") from error


def _run_folder(words: Sequence[str]) -> Path:
    """Return the folder of the trial, which is the worker's only argument."""
    return Path(words[-1])


def record_unfit(error: NodeError, words: Sequence[str], environment: Mapping[str, str]) -> None:
    """Write why this node is unfit where workers do too, if the trial's folder is there."""
    folder = _run_folder(words) / ("evaluation" if environment.get("ORCHESTRATE_STAGE") == "evaluate" else "")
    if _WORKER not in words:
        return
    from orchestrate.runs import RunDir, write_json

    rank, node = int(environment["SLURM_PROCID"]), environment.get("SLURMD_NODENAME") or socket.gethostname()
    said = {"error": str(error), "traceback": "", "preflight": {"check": error.check, "problem": str(error)}}
    facts = {"rank": rank, "node": node, "exit_code": int(error.exit_code), "time": time.time(), **said}
    attempt = environment.get("ORCHESTRATE_ATTEMPT", "1")
    try:
        if folder.is_dir():
            write_json(RunDir(folder).attempts / attempt / f"rank-{rank}.json", facts)
    except OSError as failure:
        print(f"{folder}: {failure.strerror}", file=sys.stderr)


def raise_file_limit() -> None:
    """Take as many open files as this process may: a thousand ranks need a connection each."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_FILES if hard == resource.RLIM_INFINITY else hard
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(OSError, ValueError):  # the kernel allows less than the limit says
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def main() -> int:
    """Become the worker."""
    words = sys.argv[2:] if sys.argv[1:2] == ["--"] else sys.argv[1:]
    if not words:
        print("usage: python -m orchestrate.launchers.slurm_rank -- COMMAND", file=sys.stderr)
        return Exit.BAD_INPUT
    try:
        _become(words)
    except RankError as error:
        print(f"error: {error}", file=sys.stderr)
        if isinstance(error, NodeError):
            record_unfit(error, words, os.environ)
        return error.exit_code


def _become(words: Sequence[str]) -> NoReturn:
    environment = rank_environment(os.environ, address=main_address)
    check_files(words, environment)
    raise_file_limit()
    try:
        os.execvpe(words[0], tuple(words), environment)
    except OSError as error:
        raise NodeError(f"{words[0]}: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(main())
