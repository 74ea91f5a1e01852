"""What becomes of jobs when shells are started twice, closed, and killed at the worst moment."""

import os
import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, wait_for
from tests.slurm.studies import Study

pytestmark = [pytest.mark.timeout(300)]

# Submits, and then kills the process that asked for it, before that hears of it. Once.
SBATCH = """#!/bin/bash
answer=$({sbatch} "$@") || exit $?
case " $* " in *" --test-only "*) exit 0 ;; esac
if rm "{trap}" 2>/dev/null; then kill -KILL "$PPID"; exit 1; fi
echo "$answer"
"""


def test_sweep_typed_in_two_shells_submits_each_trial_once_and_outlives_them(
    slurm: Cluster, data: Path, reference: bytes, tmp_path: Path
) -> None:
    study = Study(tmp_path, slurm, data, "twice", [41, 42])
    shells = [study.start("--watch"), study.start("--watch")]
    try:
        wait_for(lambda: any(shell.process.poll() is not None for shell in shells), "one shell gives way")
        shells.sort(key=lambda shell: shell.process.poll() is None)
        reader, owner = shells
        wait_for(lambda: len(study.jobs()) == 2, "both trials are submitted")
        os.kill(owner.process.pid, signal.SIGHUP)  # the login shell is closed
        assert owner.wait() != 0
        assert "only reads" in reader.said
        assert study.trials[0].id[:8] in reader.said  # it shows the status
        for trial in study.trials:
            trial.wait_until_done()
            assert trial.weights() == reference
    finally:
        for shell in shells:
            shell.stop()
    assert Counter(job.name for job in study.jobs()) == {trial.job_name: 1 for trial in study.trials}
    status = study.command("status", "twice")
    assert status.count("COMPLETED") >= 2, status
    assert study.start().wait() == 0


def test_controller_killed_between_sbatch_and_its_answer_finds_the_job_again(
    slurm: Cluster, data: Path, reference: bytes, tmp_path: Path
) -> None:
    folder, trap = tmp_path / "bin", tmp_path / "trap"
    folder.mkdir()
    trap.touch()
    wrapper = folder / "sbatch"
    wrapper.write_text(SBATCH.format(sbatch=shutil.which("sbatch"), trap=trap))
    wrapper.chmod(0o755)
    study = Study(tmp_path, slurm, data, "killed", [51])
    first = study.start(PATH=f"{folder}:{os.environ['PATH']}")
    assert first.wait() == -signal.SIGKILL, study.story()
    assert not trap.exists()
    assert study.start().wait() == 0, study.story()
    (trial,) = study.trials
    assert [job.name for job in study.jobs()] == [trial.job_name]
    assert [attempt.exit_code for attempt in trial.attempts()] == [0]
    assert trial.weights() == reference
