"""What of a trial is trained and what is scored, told from its files alone.

results/<encoder>.<key>.json                one probe of the final weights, or of an encoder that learned nothing
results/trained.json                        the training is over: final weights are there, and what they took
results/done.json                           all of that is scored
results/step-00000040/<encoder>.<key>.json  one probe of the checkpoint of a step
results/step-00000040/done.json             that checkpoint is scored
results/step-00000040/skipped.json          it is damaged; counts until the checkpoint is written again
"""

from pathlib import Path
from typing import Any

from orchestrate.checkpoint_files import MANIFEST, list_checkpoints, newest_first, read_manifest, step_of
from orchestrate.runs import RunDir, read_json, write_json

# The final weights, among the names of checkpoints.
FINAL = "final"
DONE, SKIPPED = "done.json", "skipped.json"


def scores_folder(run: RunDir, name: str) -> Path:
    """Return where the scores of a checkpoint, or of the final weights, lie."""
    return run.results if name == FINAL else run.results / name


def read_proof(path: Path, fingerprint: str) -> dict[str, Any] | None:
    """Return what trained.json or done.json says, if it is of this trial and no other."""
    proof = read_json(path)
    return proof if proof is not None and proof.get("fingerprint") == fingerprint else None


def unscored(run: RunDir, fingerprint: str) -> tuple[str, ...]:
    """List what waits to be scored: milestone checkpoints of the trial, the oldest first, then the final weights."""
    open_ones = [path for path in reversed(list_checkpoints(run.checkpoints)) if not _is_settled(run, path)]
    names = [path.name for path in open_ones if _is_milestone(path, fingerprint)]
    is_due = read_proof(run.trained_file, fingerprint) is not None and read_proof(run.done_file, fingerprint) is None
    return (*names, FINAL) if is_due else tuple(names)


def _is_settled(run: RunDir, checkpoint: Path) -> bool:
    folder = scores_folder(run, checkpoint.name)
    if (folder / DONE).exists():
        return True
    try:
        return (folder / SKIPPED).stat().st_mtime >= (checkpoint / MANIFEST).stat().st_mtime
    except FileNotFoundError:
        return False


def _is_milestone(checkpoint: Path, fingerprint: str) -> bool:
    """Tell whether a checkpoint is kept for ever and this trial's own; a child begins with one of its parent."""
    manifest = read_manifest(checkpoint)
    return manifest is not None and bool(manifest["milestone"]) and manifest["fingerprint"] == fingerprint


def skip(run: RunDir, name: str, damage: str) -> None:
    """Note that a checkpoint cannot be scored."""
    write_json(scores_folder(run, name) / SKIPPED, {"checkpoint": name, "damage": damage})


def num_scores(run: RunDir) -> int:
    """Count the scores of a trial, those of its checkpoints too."""
    return sum(1 for pattern in ("*.*.json", "step-*/*.*.json") for _ in run.results.glob(pattern))


def checkpoint_scores(run: RunDir) -> dict[int, dict[str, Any]]:
    """Read the records of the checkpoints that are scored, by step; a damaged one is left out."""
    names = reversed(newest_first(path.name for path in run.results.glob("step-*")))
    records = {step_of(name): read_json(scores_folder(run, name) / DONE) for name in names}
    return {step: record for step, record in records.items() if record is not None and "metrics" in record}
