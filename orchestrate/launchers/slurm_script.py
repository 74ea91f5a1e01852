"""The text that sbatch gets: a pure function of a launch plan and what the cluster config says."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrate.launchers.base import LaunchPlan
from orchestrate.launchers.cluster import Resources
from orchestrate.launchers.slurm_options import SlurmOptions, has_gpus

# Megabytes in the gigabyte of Slurm's --mem.
_MEGABYTES = 1024
# What the keeper puts in for the number of the attempt, which is known only when the job starts.
ATTEMPT = "{attempt}"
SCRIPT_NAME = "submit.sh"


@dataclass(frozen=True)
class Request:
    """What a job asks of Slurm.

    Attributes:
        resources: nodes, ranks and CPUs.
        options: the cluster config's, of the stage.
        exclude: nodes that the job must not get, besides those of the options.
        comment: for people who look at the queue.
    """

    resources: Resources
    options: SlurmOptions
    exclude: tuple[str, ...] = ()
    comment: str = ""


def script_path(folder: Path) -> Path:
    """Return where the script of a job is kept; its successors are submitted from there."""
    return folder / "jobs" / SCRIPT_NAME


def job_script(plan: LaunchPlan, request: Request, *, keeper: str) -> str:
    """Write the script of one job.

    Args:
        plan: what to start; its `script` is not looked at.
        request: what to ask for.
        keeper: interpreter that keeps the job, on its first node and outside any container.
    """
    own = {
        "job-name": plan.name,
        "comment": request.comment,
        "dependency": "singleton",  # a second job of the trial waits until this one has ended
        "chdir": str(plan.cwd),
        "output": f"{_pattern_free(plan.run_dir)}/logs/slurm-%j.log",
    }
    parts = (_head(own, request), _setup(request), _exports(plan, request), _body(plan, request, keeper))
    return "\n".join(line for part in parts for line in part)


def array_script(name: str, plans: Sequence[LaunchPlan], request: Request, *, folder: Path) -> str:
    """Write the script of an array, whose elements run the scripts of single jobs.

    An element has its array's name, so no `singleton` keeps it from running beside a single job of its trial; the
    keeper does.

    Args:
        name: of the array.
        plans: a job each; their order is that of the indices.
        request: what each of them asks for.
        folder: absolute, where the list of the elements' folders lies; see `array_folders`.
    """
    own = {
        "job-name": name,
        "comment": request.comment,
        "array": f"0-{len(plans) - 1}",
        "chdir": str(plans[0].cwd),
        "output": f"{_pattern_free(folder)}/slurm-%A_%a.log",
    }
    body = [
        "",
        f'folder=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" {shlex.quote(str(array_folders(folder)))})',
        'log="$folder/logs/slurm-${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID.log"',
        f'exec bash "$folder/jobs/{SCRIPT_NAME}" >>"$log" 2>&1',
        "",
    ]
    return "\n".join([*_head(own, request), *body])


def array_folders(folder: Path) -> Path:
    """Return the file that lists the folders of an array's jobs, a line each."""
    return folder / "folders.txt"


def excluded_nodes(script: str) -> tuple[str, ...]:
    """Return the nodes that a script excludes; several of them may be in a short form such as `gpu[07-09]`."""
    found = re.search(r"^#SBATCH --exclude=(\S+)$", script, re.MULTILINE)
    return tuple(re.findall(r"(?:[^,\[]|\[[^\]]*\])+", found[1])) if found else ()


def with_excluded(script: str, nodes: Sequence[str]) -> str:
    """Return a script that excludes these nodes, instead of those that it excluded before."""
    line = f"#SBATCH --exclude={','.join(nodes)}\n" if nodes else ""
    return re.sub(r"^#SBATCH --exclude=\S+\n", lambda _: line, script, flags=re.MULTILINE)


def _head(own: Mapping[str, str], request: Request) -> list[str]:
    return ["#!/bin/bash", *(_directive(key, value) for key, value in [*own.items(), *_asked(request)] if value)]


def _asked(request: Request) -> Iterator[tuple[str, str | bool]]:
    """List what every job asks for; empty values say nothing."""
    resources, options = request.resources, request.options
    yield "nodes", str(resources.nodes)
    yield "ntasks-per-node", str(resources.ranks_per_node)
    yield "cpus-per-task", str(resources.cpus_per_rank)
    yield "gres", options.gres
    yield "gpus-per-node", str(_gpus(request) or "")
    yield "mem", f"{max(1, round(options.memory_gb * _MEGABYTES))}M" if options.memory_gb else ""
    yield "time", str(options.time_minutes or "")
    yield "partition", options.partition
    yield "account", options.account
    yield "qos", options.qos
    yield "constraint", options.constraint
    yield "exclusive", options.exclusive
    yield "exclude", ",".join(dict.fromkeys((*options.exclude, *request.exclude)))
    # To the ranks, not to the batch script (B:), which has nothing to save.
    yield "signal", f"USR1@{options.lead_seconds}"
    yield "requeue", True
    yield "open-mode", "append"
    for key, value in options.options.items():
        yield key, value if isinstance(value, bool) else str(value)


def _gpus(request: Request) -> int:
    options, resources = request.options, request.resources
    if options.gpus_per_node or has_gpus(options.gres) or resources.device != "cuda":
        return options.gpus_per_node
    return resources.ranks_per_node


def _directive(key: str, value: str | bool) -> str:
    return f"#SBATCH --{key}" if value is True else f"#SBATCH --{key}={_sbatch_quote(str(value))}"


def _sbatch_quote(text: str) -> str:
    """Quote for sbatch, which knows double quotes and backslashes, but neither variables nor `'` inside them."""
    if re.fullmatch(r"[\w./:,=@%+\[\]-]+", text, re.ASCII):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _pattern_free(path: Path) -> str:
    """Write a folder in a name of a log, where sbatch and srun look for patterns such as %j."""
    return str(path).replace("%", "%%")


def _setup(request: Request) -> list[str]:
    return ["", *request.options.setup] if request.options.setup else []


def _exports(plan: LaunchPlan, request: Request) -> list[str]:
    # Since 22.05 srun does not take the number from sbatch by itself.
    environment = {**plan.environment, "SRUN_CPUS_PER_TASK": str(request.resources.cpus_per_rank)}
    return ["", *(f"export {key}={shlex.quote(value)}" for key, value in sorted(environment.items()))]


def _body(plan: LaunchPlan, request: Request, keeper: str) -> list[str]:
    """Write the commands, inside out: the worker, in the shim that makes a rank of a task, started by srun, kept."""
    options = request.options
    log = f"{_pattern_free(plan.run_dir)}/logs/attempt-{ATTEMPT}/rank-%t.log"
    # Ranks in blocks: those of a node follow each other, which the keeper and the shim count on.
    srun = ("--kill-on-bad-exit=1", "--wait=60", "--unbuffered", "--distribution=block", "--open-mode=append")
    return [
        "",
        _line("exec", keeper, "-m", "orchestrate.launchers.slurm_job"),
        _line("  --run-dir", str(plan.run_dir), "--script", str(script_path(plan.run_dir))),
        _line("  --lead-seconds", str(options.lead_seconds), "--"),
        _line("  srun", *srun, *options.srun),
        _line(f"  --output={log}"),
        _line("  ", *options.container, plan.command[0], "-m", "orchestrate.launchers.slurm_rank", "--"),
        f"  {shlex.join(plan.command)}",
        "",
    ]


def _line(first: str, *words: str) -> str:
    indent = len(first) - len(first.lstrip())
    return " " * indent + shlex.join(filter(None, (first.strip(), *words))) + " \\"
