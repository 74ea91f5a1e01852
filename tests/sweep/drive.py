"""A controller in a process of its own: `python -m tests.sweep.drive RUNS SWEEP_FILE [die before|after]`.

With a third argument it is killed at its first submission, as by SIGKILL before or after the job is there.
"""

import os
import signal
import sys
from pathlib import Path

from orchestrate.launchers.base import LaunchPlan
from orchestrate.launchers.local import LocalLauncher
from orchestrate.sweep.session import Session
from tests.launchers.jobs import STAND_IN, cluster
from tests.sweep.sweeps import Memory, record_of


class FatalLauncher(LocalLauncher):
    def __init__(self, runs: Path, moment: str) -> None:
        super().__init__(cluster(), runs, worker=STAND_IN)
        self.moment = moment

    def submit(self, plan: LaunchPlan) -> str:
        if self.moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        job = super().submit(plan)
        if self.moment == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return job


if __name__ == "__main__":
    runs, file, moment = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    session = Session(
        runs,
        FatalLauncher(runs, moment),
        Memory(),
        check_data=lambda url: None,
        write_report=lambda sweep_dir, trials_dir: sweep_dir / "none",
    )
    session.make_true(record_of(file))
