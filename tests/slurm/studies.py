"""Small sweeps on a real Slurm: written, run by commands in the background, watched through their files."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from orchestrate.config.run import RunConfig, parse_run
from orchestrate.data.index import dataset_identity
from orchestrate.launchers.attempts import AttemptRecord, job_file, job_numbers, load_attempts
from orchestrate.launchers.base import job_name
from orchestrate.runs import RunDir, read_json
from orchestrate.sweep.causes import Cause, cause_of
from orchestrate.sweep.space import pin
from tests.slurm.cluster import PATIENCE_SECONDS, ROOT, Cluster, Job, wait_for
from tests.slurm.pace import SECONDS

STEPS = 60
# Of an image, while a trial is meant to be hit: with 16 images a rank, 60 steps take 12 s.
PACE = "0.012"


def base(data: Path) -> dict[str, Any]:
    """Return the run that all trials of these tests are: they differ in their probes, which no weight depends on."""
    return {
        "data": {"train": str(data / "train"), "val": str(data / "val")},
        "method": {"name": "barlow_twins", "embed_dim": 16},
        "backbone": {"name": "tiny_resnet"},
        "views": {"name": "small_grey", "size": 28, "transform": "tests.slurm.pace:pace"},
        "optim": {"name": "adamw", "lr": 4.0e-3},
        "train": {"global_batch": 32, "budget": f"{STEPS}step", "warmup": "10%", "seed": 0},
        "system": {"engine": "ddp", "checkpoint_every": "5step", "hang_minutes": 0.4},
    }


@dataclass(frozen=True)
class Attempt:
    """What the keeper of a job wrote when it started."""

    number: int
    job: str
    nodes: tuple[str, ...]
    started: float
    checkpoint: int


@dataclass(frozen=True)
class Trial:
    """A trial of a study, seen from outside."""

    run: RunDir
    cluster: Cluster

    @property
    def id(self) -> str:
        return self.run.path.name

    @property
    def job_name(self) -> str:
        return job_name(self.id)

    @property
    def done(self) -> bool:
        return self.run.done_file.exists()

    def steps(self) -> list[int]:
        """Return the logged steps, in the order of the file."""
        if not self.run.metrics_file.exists():
            return []
        lines = self.run.metrics_file.read_text().splitlines(keepends=True)
        return [int(yaml.safe_load(line)["step"]) for line in lines if line.endswith("\n")]

    def num_lines(self) -> int:
        """Count the lines of metrics.jsonl, which is quicker."""
        path = self.run.metrics_file
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def weights(self) -> bytes:
        """Return the final weights."""
        return (self.run.results / "weights.safetensors").read_bytes()

    def attempts(self) -> tuple[AttemptRecord, ...]:
        """Return what is known of every attempt."""
        return load_attempts(self.run)

    def causes(self) -> dict[int, Cause]:
        """Name the causes of the ends of all attempts but that which finished the trial, by number."""
        return {each.number: cause_of(each) for each in self.attempts() if each.exit_code != 0}

    def wait_for_training(self, *, after: int = 0, steps: int = 4, patience: float = PATIENCE_SECONDS) -> Attempt:
        """Wait until an attempt later than number `after` has taken some steps; return it."""
        what = f"a later attempt than {after} of {self.id} takes {steps} steps"
        wait_for(lambda: self._trains(after, steps), what, patience=patience)
        return self.newest_attempt()

    def newest_attempt(self) -> Attempt:
        """Return the last attempt that has started."""
        record = read_json(job_file(self.run, job_numbers(self.run)[-1]))
        assert record is not None
        return Attempt(
            record["attempt"], record["job"], tuple(record["nodes"]), record["started"], record["checkpoint_step"]
        )

    def _trains(self, after: int, steps: int) -> bool:
        if not [number for number in job_numbers(self.run) if number > after] or not self.run.metrics_file.exists():
            return False
        attempt = self.newest_attempt()
        # The attempt before ended before this one started; it cuts what was logged beyond the checkpoint.
        written = self.run.metrics_file.stat().st_mtime
        return written > attempt.started and self.num_lines() >= attempt.checkpoint + steps

    def story(self) -> str:
        """Tell what happened, for the message of a failed test."""
        parts = [f"==> {self.id} <== {self.num_lines()} steps, done: {self.done}"]
        parts += [str(attempt) for attempt in self.attempts()]
        for log in sorted(self.run.path.glob("logs/**/*.log")):
            parts += [f"--> {log.relative_to(self.run.path)}", *log.read_text(errors="replace").splitlines()[-20:]]
        return "\n".join(parts)

    def wait_until_done(self, patience: float = PATIENCE_SECONDS) -> None:
        wait_for(lambda: self.done, f"{self.id} is done\n", patience=patience)


@dataclass
class Study:
    """A sweep whose trials differ in the `k` of their kNN probe alone.

    Attributes:
        folder: for its files and runs.
        cluster: where it runs.
        data: folder with `train` and `val`.
        name: of the sweep.
        ks: one a trial; no two studies of one cluster may share one, or they would share jobs.
        changes: of the cluster config, a section each.
        system: changes of the section `system`.
    """

    folder: Path
    cluster: Cluster
    data: Path
    name: str
    ks: Sequence[int]
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    system: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.runs = self.folder / "runs"
        self.sweep_file, self.cluster_file = self.folder / f"{self.name}.yaml", self.folder / "cluster.yaml"
        run = base(self.data)
        run["system"] |= self.system
        space = {"probes": [[{"name": "knn", "k": k}] for k in self.ks]}
        objective = {"metric": f"knn_k{self.ks[0]}_cosine_t0.07.top1", "goal": "max"}
        sweep = {"name": self.name, "base": run, "space": space, "objective": objective}
        self.sweep_file.write_text(yaml.safe_dump(sweep))
        self.cluster_file.write_text(yaml.safe_dump(self._cluster_config()))
        self.trials = [self._trial(run | {"probes": [{"name": "knn", "k": k}]}) for k in self.ks]

    def _cluster_config(self) -> dict[str, Any]:
        config: dict[str, Any] = {
            "launcher": "slurm",
            "resources": {"nodes": 2, "ranks_per_node": 1, "cpus_per_rank": 1, "device": "cpu"},
            "limits": {"parallel": 8, "min_free_gb": 0.1},
            "environment": {SECONDS: PACE},
            "slurm": {"partition": "low", "time_minutes": 60, "lead_seconds": 60, "poll_seconds": 1},
        }
        for section, values in self.changes.items():
            config[section] = config.get(section, {}) | values
        return config

    def _trial(self, values: dict[str, Any]) -> Trial:
        config, problems = parse_run(values)
        assert isinstance(config, RunConfig), problems
        config, _, problems = pin(config, dataset_identity)
        assert not problems, problems
        return Trial(RunDir(self.runs / "trials" / config.fingerprint()), self.cluster)

    def start(self, *options: str, **environment: str) -> "Controller":
        """Type `orchestrate sweep` in a shell of its own."""
        arguments = ["sweep", str(self.sweep_file), "--cluster", str(self.cluster_file), *options]
        return Controller(self, arguments, environment)

    def command(self, *arguments: object, check: bool = True) -> str:
        """Type a command and return what it says."""
        done = subprocess.run(
            [sys.executable, "-m", "orchestrate", *map(str, arguments), "--runs", str(self.runs)],
            capture_output=True,
            text=True,
            env=clean_environment(self.cluster.environment),
            cwd=ROOT,
            timeout=120,
        )
        assert not check or done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        return done.stdout

    def jobs(self) -> list[Job]:
        """List the jobs of this study that Slurm remembers."""
        names = {trial.job_name for trial in self.trials}
        return [job for job in self.cluster.jobs() if job.name in names]

    def story(self) -> str:
        """Tell what was on the screens, and what happened to trials that are not done."""
        parts = [path.read_text() for path in sorted(self.folder.glob("shell-*.log"))]
        return "\n".join(parts + [trial.story() for trial in self.trials if not trial.done])


class Controller:
    """`orchestrate sweep` in a shell of its own."""

    def __init__(self, study: Study, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        self._study = study
        self.log = study.folder / f"shell-{len(list(study.folder.glob('shell-*.log'))) + 1}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "orchestrate", *arguments, "--runs", str(study.runs)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=clean_environment(study.cluster.environment) | environment,
                cwd=ROOT,
                start_new_session=True,  # a signal to the shell of the tests is none to this one
            )

    @property
    def said(self) -> str:
        """What stands on the screen."""
        return self.log.read_text()

    def wait(self, patience: float = PATIENCE_SECONDS) -> int:
        """Wait for the end and return the exit code."""
        try:
            return self.process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the sweep did not end in {patience:.0f} s\n{self._study.story()}") from None

    def stop(self) -> None:
        """End it in any case."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def clean_environment(added: Mapping[str, str]) -> dict[str, str]:
    """Return this process's environment without what a job or another test left in it."""
    mine = {key: value for key, value in os.environ.items() if not key.startswith(("ORCHESTRATE_", "SLURM_"))}
    return mine | dict(added)
