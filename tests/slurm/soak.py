"""Hit the trials of one sweep by random faults, and look whether anything was lost, repeated or miscounted.

    scripts/soak --faults 100 --trials 12 --seed 1

It starts a Slurm of its own, trains one trial undisturbed, then runs a sweep of the same training under faults.
In the end every trial is complete, its metrics have every step once, its weights are those of the undisturbed one, and
the hours that we count are those that Slurm has accounted. Prints a line a fault and a summary; exits 1 if not so.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from orchestrate.sweep.causes import Cause
from orchestrate.sweep.ledger import Ledger
from orchestrate.sweep.observe import observe
from orchestrate.sweep.observed import ledger_of
from orchestrate.sweep.record import find_record
from orchestrate.wiring import launcher_of
from tests.datasets import make_shapes
from tests.slurm import faults
from tests.slurm.cluster import Cluster
from tests.slurm.storm import Case, Storm
from tests.slurm.studies import STEPS, Study, Trial

# A trial may wait for all others.
PATIENCE_SECONDS = 3600.0
# Two nodes a trial, and some for those that were lost or are not trusted any more.
NUM_NODES = 12
# Steps after which a trial that trains is hit.
STEPS_BEFORE = (1, 6)
# What our count of an attempt may differ from Slurm's: we begin when our keeper does and end when it has looked at the
# end, Slurm when it has set up and cleaned the nodes; and a lost node counts for Slurm until it was missed.
SECONDS_OF_ATTEMPT = 10.0
SECONDS_OF_LOST_NODE = 45.0


@dataclass(frozen=True)
class Account:
    """What a trial has cost by our count and by Slurm's, in seconds of a job; and what they may differ."""

    ours: float
    slurms: float
    tolerance: float

    @property
    def agrees(self) -> bool:
        return abs(self.ours - self.slurms) <= self.tolerance


def kinds(outage_seconds: float) -> list[Case]:
    """Return every fault that a soak draws from."""
    return [
        Case("lost rank", faults.lose_rank, Cause.INFRASTRUCTURE),
        Case("lost first node", faults.lose_node(0), Cause.NODE),
        Case("lost second node", faults.lose_node(1), Cause.NODE),
        Case("frozen rank", faults.freeze_rank, Cause.HANG),
        Case("hanging loader", faults.hang_loader, Cause.HANG),
        Case("preempted", faults.preempt, Cause.PREEMPTED),
        Case("requeue", faults.requeue, Cause.PREEMPTED),
        Case("USR1", faults.send("USR1"), Cause.PREEMPTED),
        Case("USR2", faults.send("USR2"), Cause.PREEMPTED),
        Case("TERM", faults.send("TERM"), Cause.PREEMPTED),
        Case("damaged checkpoint", faults.damage_checkpoint, Cause.INFRASTRUCTURE),
        Case("slurmctld away", faults.lose_controller(outage_seconds), Cause.PREEMPTED),
    ]


def draw(rng: random.Random, *, num_faults: int, num_trials: int, outage_seconds: float) -> list[list[Case]]:
    """Deal random faults to trials, nearly the same number to each, and no kind again before there was each."""
    every = kinds(outage_seconds)
    drawn = [case for _ in range(0, num_faults, len(every)) for case in rng.sample(every, len(every))][:num_faults]
    return [drawn[index::num_trials] for index in range(num_trials)]


def problems(study: Study, reference: bytes) -> list[str]:
    """Say what is wrong with a sweep that has gone through faults; nothing if all is well."""
    found = []
    for trial in study.trials:
        if not trial.done:
            found.append(f"{trial.id} is not done\n{trial.story()}")
            continue
        if trial.steps() != list(range(1, STEPS + 1)):
            found.append(f"{trial.id}: steps are not logged once each: {trial.steps()}")
        if trial.weights() != reference:
            found.append(f"{trial.id}: other weights")
        account = account_of(trial)
        if not account.agrees:
            found.append(f"{trial.id}: {account}\n{trial.story()}")
    return found


def account_of(trial: Trial) -> Account:
    """Compare the time of a trial's attempts with what accounting says of its jobs."""
    attempts = trial.attempts()
    which = ("-X", "-D", "-P", "-n", "--starttime=now-7days", f"--name={trial.job_name}")
    text = trial.cluster.run("sacct", *which, "-o", "ElapsedRaw,State")
    slurms = [line.split("|") for line in text.splitlines()]
    lost = sum(state.startswith("NODE_FAIL") for _, state in slurms)
    tolerance = SECONDS_OF_ATTEMPT * len(attempts) + SECONDS_OF_LOST_NODE * lost
    return Account(sum(each.seconds for each in attempts), sum(float(seconds) for seconds, _ in slurms), tolerance)


def ledgers(study: Study) -> list[Ledger]:
    """Return the hours of each trial as `orchestrate status` splits them."""
    record = find_record(study.runs, study.name)
    assert record is not None
    seen = observe(study.runs, record.trial_ids, launcher_of(record, study.runs))
    return [ledger_of(each) for each in seen.values()]


def main() -> int:
    """Run the soak that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parallel", type=int, default=3, help="trials at once")
    parser.add_argument("--outage", type=float, default=60.0, help="seconds that slurmctld is away")
    parser.add_argument("--folder", type=Path, help="keep everything there; else it is removed if all is well")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="soak-"))
    make_shapes(folder / "data/train", 203, seed=0)
    make_shapes(folder / "data/val", 101, seed=1, split="val")
    cluster = Cluster(folder / "slurm", nodes=NUM_NODES, accounting=True, preempt_signal=options.seed % 2 == 0)
    code = 1
    try:
        cluster.up()
        code = soak(cluster, folder, options)
    finally:
        cluster.down()
        if code == 0 and options.folder is None:
            shutil.rmtree(folder)
    return code


def soak(cluster: Cluster, folder: Path, options: argparse.Namespace) -> int:
    """Run the undisturbed trial and the sweep under faults, and print what became of it."""
    began = time.monotonic()
    calm = Study(folder / "calm", cluster, folder / "data", "calm", [1], {"environment": {"PACE_SECONDS": "0"}})
    assert calm.start().wait() == 0, calm.story()
    reference = calm.trials[0].weights()
    rng = random.Random(options.seed)
    plan = draw(rng, num_faults=options.faults, num_trials=options.trials, outage_seconds=options.outage)
    shape = {"rng": rng, "parallel": options.parallel, "patience": PATIENCE_SECONDS}
    storm = start(cluster, folder / "storm", folder / "data", plan, **shape)
    try:
        for index in range(len(plan)):
            storm.outcome(index)
        assert storm.controller.wait() == 0, storm.study.story()
    finally:
        storm.end()
    found = problems(storm.study, reference)
    print("\n".join(found) or "all trials complete, every step once, same weights, same hours as Slurm counts")
    print(f"faults: {dict(Counter(case.name for cases in plan for case in cases))}")
    for trial in storm.study.trials:
        print(f"{trial.id}: {len(trial.attempts())} attempts, {account_of(trial)}")
    print(f"hours of ranks: {sum(ledgers(storm.study), Ledger())}; {time.monotonic() - began:.0f} s in {folder}")
    return 1 if found else 0


def start(
    cluster: Cluster,
    folder: Path,
    data: Path,
    plan: list[list[Case]],
    *,
    rng: random.Random,
    parallel: int,
    patience: float,
) -> Storm:
    """Start the sweep whose trials are hit as planned; see `Storm`."""
    changes = {"slurm": {"exclusive": True}, "limits": {"parallel": parallel}}
    study = Study(folder, cluster, data, "soak", range(101, 101 + len(plan)), changes)
    return Storm(study, plan, steps=lambda: rng.randint(*STEPS_BEFORE), patience=patience)


if __name__ == "__main__":
    sys.exit(main())
