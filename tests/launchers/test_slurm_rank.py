"""The shim between a task of Slurm's and a worker: run as Slurm runs it, with Slurm's variables."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrate.launchers.slurm_rank import why_not

SHIM = (sys.executable, "-m", "orchestrate.launchers.slurm_rank", "--")
SHOW = (sys.executable, "-c", "import json, os; print(json.dumps(dict(os.environ)))")
# As Slurm 22.05 gives them to the second task of the second of two nodes.
TASK = {
    "SLURM_JOB_ID": "5",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_NNODES": "2",
    "SLURM_GTIDS": "2,3",
    "SLURM_STEP_GPUS": "0,1",
    "SLURMD_NODENAME": "no-such-host-2",
    "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1",
    "ORCHESTRATE_MAIN_NODE": "no-such-host-1",
    "MASTER_PORT": "12345",
}


def shim(changes: dict[str, str] | None = None, *command: str, path: str = "") -> "subprocess.CompletedProcess[str]":
    inherited = {
        key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "ORCHESTRATE_", "GLOO"))
    }
    environment = {key: value for key, value in (inherited | TASK | (changes or {})).items() if value != "unset"}
    environment["PATH"] = f"{path}:{environment['PATH']}"
    words = (*SHIM, *(command or SHOW))
    return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=60)


def made(changes: dict[str, str] | None = None, *, path: str = "") -> dict[str, str]:
    result = shim(changes, path=path)
    assert result.returncode == 0, result.stderr
    return dict(json.loads(result.stdout))


def test_task_becomes_the_rank_that_slurm_made_it() -> None:
    environment = made()
    expected = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "12345"}
    expected |= {"ORCHESTRATE_NODE": "no-such-host-2", "ORCHESTRATE_GPUS": "0,1", "ORCHESTRATE_JOB": "5"}
    assert expected.items() <= environment.items()
    assert TASK.items() <= environment.items()


def test_variables_of_a_surrounding_job_do_not_lead_elsewhere() -> None:
    environment = made({"RANK": "9", "MASTER_ADDR": "elsewhere", "ORCHESTRATE_RENDEZVOUS": "file:///elsewhere"})
    assert (environment["RANK"], environment["MASTER_ADDR"]) == ("3", "127.0.0.1")
    assert "ORCHESTRATE_RENDEZVOUS" not in environment


def test_node_names_that_do_not_resolve_give_way_to_addresses() -> None:
    assert made()["MASTER_ADDR"] == "127.0.0.1"


def test_node_name_that_resolves_is_taken() -> None:
    assert made({"ORCHESTRATE_MAIN_NODE": "localhost", "SLURM_NODEID": "0"})["MASTER_ADDR"] == "localhost"


def test_name_that_means_this_node_itself_leads_nowhere_from_another_node() -> None:
    assert "means this node itself" in why_not("localhost", is_here=False)
    assert why_not("localhost", is_here=True) == ""
    assert why_not("127.0.0.1", is_here=False) == ""  # what Slurm itself says is believed


def test_slurms_own_address_is_the_last_resort(tmp_path: Path) -> None:
    answer = "NodeName=no-such-host-1 Arch=x86_64\\n   NodeAddr=127.0.0.1 NodeHostName=localhost"
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\n[ \"$*\" = 'show node no-such-host-1' ] && printf '{answer}'\n")
    (tmp_path / "scontrol").chmod(0o755)
    assert made({"SLURM_LAUNCH_NODE_IPADDR": "unset"}, path=str(tmp_path))["MASTER_ADDR"] == "127.0.0.1"


def test_node_without_a_way_to_rank_0_says_what_it_tried_and_is_unfit(tmp_path: Path) -> None:
    (tmp_path / "scontrol").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "scontrol").chmod(0o755)
    result = shim({"SLURM_LAUNCH_NODE_IPADDR": "unset"}, path=str(tmp_path))
    assert result.returncode == 87
    for tried in ("'no-such-host-1'", "SLURM_LAUNCH_NODE_IPADDR: is not known", "NodeAddr of `scontrol show node"):
        assert tried in result.stderr


def test_rank_0_elsewhere_than_the_port_is_refused() -> None:
    result = shim({"SLURM_PROCID": "0"})
    assert result.returncode == 2
    assert "rank 0 is on no-such-host-2, but the port was chosen on no-such-host-1" in result.stderr


@pytest.mark.parametrize("name", ["SLURM_PROCID", "SLURM_NTASKS", "MASTER_PORT"])
def test_missing_variable_is_named(name: str) -> None:
    result = shim({name: "unset"})
    assert (result.returncode, f"{name} is not set" in result.stderr) == (2, True)


def test_worker_that_cannot_be_run_is_named() -> None:
    result = shim({}, "/no/such/python", "x")
    assert (result.returncode, result.stderr) == (87, "error: /no/such/python: No such file or directory\n")


def test_node_without_the_trials_file_system_is_unfit_and_nothing_is_made_there(tmp_path: Path) -> None:
    run = tmp_path / "00000000000000a1"
    result = shim({"ORCHESTRATE_ATTEMPT": "3"}, *SHOW, "-m", "orchestrate.worker", str(run))
    assert (result.returncode, run.exists()) == (87, False)
    assert f"{run}/run.yaml: No such file or directory, though rank 0's node has its folder" in result.stderr
    on_first = shim({"SLURM_NODEID": "0"}, *SHOW, "-m", "orchestrate.worker", str(run))
    assert on_first.returncode == 0  # the worker itself says so there


def test_unfit_node_is_recorded_where_its_trial_can_be_seen(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").touch()
    command = ("/no/such/python", "-m", "orchestrate.worker", str(tmp_path))
    assert shim({"ORCHESTRATE_ATTEMPT": "3"}, *command).returncode == 87
    record = json.loads((tmp_path / "attempts" / "3" / "rank-3.json").read_text())
    assert (record["rank"], record["node"], record["exit_code"]) == (3, "no-such-host-2", 87)
    assert record["preflight"] == {"check": "files", "problem": "/no/such/python: No such file or directory"}


def test_rank_may_open_as_many_files_as_its_user_may() -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 256), hard))
    try:
        show = (sys.executable, "-c", "import resource; print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])")
        assert int(shim({}, *show).stdout) == (2**20 if hard == resource.RLIM_INFINITY else hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_ranks_of_one_node_talk_over_loopback_unless_told_otherwise() -> None:
    alone = made({"SLURM_NNODES": "1", "SLURM_LAUNCH_NODE_IPADDR": "unset"})
    assert (alone["MASTER_ADDR"], alone["GLOO_SOCKET_IFNAME"]) == ("127.0.0.1", "lo")
    assert made({"SLURM_NNODES": "1", "GLOO_SOCKET_IFNAME": "ib0"})["GLOO_SOCKET_IFNAME"] == "ib0"


def test_interface_towards_rank_0_is_named_where_the_hosts_own_name_is_loopback() -> None:
    try:
        own = socket.gethostbyname(socket.gethostname())
    except OSError:
        own = "127.0.0.1"
    assert made().get("GLOO_SOCKET_IFNAME", "") == ("lo" if own.startswith("127.") else "")


def test_shim_starts_without_heavy_imports() -> None:
    code = "import sys, orchestrate.launchers.slurm_rank; print(*sys.modules)"
    modules = subprocess.run((sys.executable, "-c", code), capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "pydantic", "numpy", "yaml", "submitit", "asyncio", "json"} & set(modules)
