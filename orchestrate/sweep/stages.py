"""What the control plane asks of trials whose evaluation is a job of its own: what is trained, what waits for scores.

A training of the stage `pretrain` ends with results/trained.json. Jobs of the stage `evaluate` score the milestone
checkpoints while it goes on, and in the end the final weights, which makes results/done.json.
"""

from __future__ import annotations

from orchestrate import score_files
from orchestrate.runs import RunDir


def is_trained(run: RunDir) -> bool:
    """Tell whether results/trained.json proves that the training of this trial, and of no other, is over."""
    return score_files.read_proof(run.trained_file, run.path.name) is not None


def unevaluated(run: RunDir) -> tuple[str, ...]:
    """List what a job of the stage `evaluate` would score now: `step-00000040` for a milestone, `final` last.

    Costs a listing of the checkpoints, and a small file for each of them that has no scores.
    """
    return score_files.unscored(run, run.path.name)


def num_scores(run: RunDir) -> int:
    """Count the scores of a trial, of checkpoints and final weights: what the progress of its evaluation is told by."""
    return score_files.num_scores(run)
