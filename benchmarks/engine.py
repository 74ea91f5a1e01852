"""What the trainer costs beside bare torch: time and memory of a step, stall of a checkpoint, time to recover.

    python benchmarks/engine.py [--part step checkpoint restart] [--data DATASET] [--backbone resnet18] [--json]

step: ResNet-18 Barlow Twins on 2 ranks, 64 px views. Ours is the whole trainer (DeepSpeed, logs, checks), the peer a
plain loop over DistributedDataParallel with the same method, optimizer and batches. Rounds of both alternate.
checkpoint: seconds that training stands still for a save of the same state. The peers are save and async_save of
torch.distributed.checkpoint, which neither sync, hash nor rename.
restart: from SIGKILL of one rank to the next optimizer step under `orchestrate run`, and its parts. The peer is a bare
script that is started at once, torch.load included.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RANKS, STEPS, ROUNDS = 2, 30, 5
PARTS = ("step", "checkpoint", "restart")
Facts = dict[str, Any]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument(
        "--data", default="data/fashion-mnist-small", help="a packed dataset; `make demo` makes this one"
    )
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--engine", default="deepspeed", choices=("deepspeed", "ddp"))
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    for part in options.part:
        {"step": measure_steps, "checkpoint": measure_saves, "restart": measure_restart}[part](options)


def measure_steps(options: argparse.Namespace) -> None:
    """Alternate the trainer and the plain loop."""
    rounds = [(on_ranks("bare", options), on_ranks("ours", options)) for _ in range(ROUNDS)]
    for key, name, unit in (("step", "step time", "s"), ("memory", "peak memory of a rank", "GB")):
        ours, peer = (statistics.median(row[who][0][key] for row in rounds) for who in (1, 0))
        ratio = statistics.median(ours_row[0][key] / bare_row[0][key] for bare_row, ours_row in rounds)
        show(f"{name}, {options.backbone}", ours, peer, unit, ratio=ratio, options=options)


def measure_saves(options: argparse.Namespace) -> None:
    """Save the state of a training on two ranks, synchronously and not."""
    facts = on_ranks("saves", options)[0]
    size = facts["megabytes"]
    for mode in ("sync", "async"):
        show(
            f"stall of a save of {size:.0f} MB, {mode}",
            facts[f"ours {mode}"],
            facts[f"peer {mode}"],
            "s",
            options=options,
        )
    show("time until it is on the disk, async", facts["ours written"], facts["peer written"], "s", options=options)


def measure_restart(options: argparse.Namespace) -> None:
    """Kill a rank of a running sweep and watch what happens when."""
    rows = [one_restart(options) for _ in range(3)]
    peer = statistics.median(on_ranks("restart", options)[0]["total"] for _ in range(3))
    total = statistics.median(sum(row.values()) for row in rows)
    show("SIGKILL of a rank to the next step", total, peer, "s", options=options)
    for part in rows[0]:
        show(f"  of which {part}", statistics.median(row[part] for row in rows), None, "s", options=options)


def values_of(options: argparse.Namespace, steps: int, **system: Any) -> dict[str, Any]:
    """Return the config of a training as it stands in YAML."""
    data = {split: str(Path(options.data).resolve() / split) for split in ("train", "val")}
    return {
        "data": data,
        "method": {"name": "barlow_twins", "embed_dim": 256},
        "backbone": {"name": options.backbone},
        "views": {"name": "simclr", "size": 64},
        "optim": {"name": "sgd", "lr": 0.01},
        "train": {"global_batch": 32, "budget": f"{steps}step"},
        "probes": [],
        "system": {"engine": options.engine, "checkpoint_every": "1Mstep", **system},
    }


CLUSTER = f"""
launcher: local
resources: {{nodes: 1, ranks_per_node: {RANKS}, cpus_per_rank: 1, device: cpu}}
limits: {{parallel: 1, min_free_gb: 0.1}}
"""


def on_ranks(work: str, options: argparse.Namespace) -> list[Facts]:
    """Run a part of this script on two new processes; return what each found."""
    with tempfile.TemporaryDirectory() as folder:
        common = {"WORLD_SIZE": str(RANKS), "ORCHESTRATE_RENDEZVOUS": f"file://{folder}/store", "FOLDER": folder}
        common |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "STARTED": repr(time.time())}
        values = json.dumps(values_of(options, STEPS))
        command = [sys.executable, str(Path(__file__).with_name("engine_rank.py")), work, values, str(STEPS)]
        processes = []
        for rank in range(RANKS):
            mine = {"RANK": str(rank), "LOCAL_RANK": str(rank), "RESULT": f"{folder}/result-{rank}"}
            processes.append(subprocess.Popen(command, env=os.environ | common | mine, stdout=subprocess.DEVNULL))
        if max(process.wait() for process in processes) > 0:
            sys.exit(f"a rank of `{work}` failed")
        return [json.loads(Path(folder, f"result-{rank}").read_text()) for rank in range(RANKS)]


# The restart of a sweep, watched from outside.


def one_restart(options: argparse.Namespace) -> Facts:
    """Kill a rank in the middle of a training; return the seconds of each part until the next step is logged."""
    import yaml

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "cluster.yaml").write_text(CLUSTER)
        (folder / "run.yaml").write_text(yaml.safe_dump(values_of(options, 100_000, checkpoint_every="5step")))
        command = [
            sys.executable,
            "-m",
            "orchestrate",
            "run",
            str(folder / "run.yaml"),
            "--cluster",
            str(folder / "cluster.yaml"),
            "--runs",
            str(folder / "runs"),
        ]
        controller = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            return _watch_a_restart(folder / "runs")
        finally:
            controller.kill()
            for pid in workers_below(folder):
                os.kill(pid, signal.SIGKILL)
            time.sleep(1)  # the supervisor writes its last record into the folder


def _watch_a_restart(runs: Path) -> Facts:
    (run,) = wait_for(lambda: list(runs.glob("trials/*")))
    log = run / "metrics.jsonl"
    wait_for(lambda: log.exists() and len(log.read_text().splitlines()) > 12)
    killed = time.time()
    os.kill(workers_below(runs)[0], signal.SIGKILL)
    pids = wait_for(lambda: [pid for pid in workers_below(runs) if started(pid) > killed])
    spawned = min(started(pid) for pid in pids)
    facts = wait_for(
        lambda: json.loads((run / "attempts/2.json").read_text()) if (run / "attempts/2.json").exists() else None
    )
    facts = wait_for(
        lambda: (
            (status := json.loads((run / "status.json").read_text())).get("attempt") == 2
            and status.get("startup_seconds")
        )
    )
    return {"notice, stop the other rank, wait, start again": spawned - killed, **facts}


def wait_for(condition: Callable[[], Any]) -> Any:
    """Return the first true answer within two minutes."""
    ends = time.monotonic() + 120
    while time.monotonic() < ends:
        if found := condition():
            return found
        time.sleep(0.01)
    raise TimeoutError("nothing happened for two minutes")


def workers_below(folder: Path) -> list[int]:
    """List the ranks that work below a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if "orchestrate.worker" in command and str(folder) in command:
            found.append(int(process.name))
    return found


def started(pid: int) -> float:
    """Return when a process was started, Unix seconds."""
    ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")


def show(
    name: str, ours: float, peer: float | None, unit: str, *, options: argparse.Namespace, ratio: float | None = None
) -> None:
    """Print one result."""
    ratio = ratio or (ours / peer if peer else None)
    if options.json:
        print(json.dumps({"name": name, "ours": ours, "peer": peer, "ratio": ratio, "unit": unit}), flush=True)
    else:
        beside = f"   peer {peer:8.3f} {unit}   ratio {ratio:.3f}" if peer and ratio else ""
        print(f"{name:55s} {ours:8.3f} {unit}{beside}", flush=True)


if __name__ == "__main__":
    main()
