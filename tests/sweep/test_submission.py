"""What a submission needs besides the launcher."""

from pathlib import Path

from orchestrate.runs import write_json
from orchestrate.store import open_store, store_path
from orchestrate.sweep.observe import run_dir_of
from orchestrate.sweep.submission import Submitter
from tests.sweep.sweeps import CountingLauncher, record_of, write_sweep


def test_code_is_copied_only_if_a_trial_needs_it(tmp_path: Path) -> None:
    record, runs = record_of(write_sweep(tmp_path)), tmp_path / "runs"
    with_code, without = record.trial_ids
    (runs / "code" / "0123456789ab" / "tree").mkdir(parents=True)
    write_json(run_dir_of(runs, with_code).code_file, {"digest": "0123456789ab", "commit": None, "dirty": False})
    with open_store(store_path(runs)) as store:

        def num_copies(*trial_ids: str) -> int:
            submitter = Submitter(record, runs, CountingLauncher(runs), store, clock=lambda: 1.0)
            submitter.fix_code(trial_ids)
            return len(list((runs / "code").iterdir()))

        assert num_copies() == 1
        assert num_copies(with_code) == 1
        assert num_copies(with_code, without) == 2
