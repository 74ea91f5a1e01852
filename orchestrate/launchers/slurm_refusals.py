"""Sort what sbatch says against a request: full, no answer, or wrong, with the key to change."""

from __future__ import annotations

import re

from orchestrate.errors import LaunchError
from orchestrate.launchers.base import TryLaterError
from orchestrate.launchers.slurm_commands import COMMAND_NOT_FOUND, Answer

# Words of Slurm's own errors, in any case. A limit on submissions is over when jobs end.
_FULL = (
    r"\w*Submit\w*Limit",  # QOSMaxSubmitJobPerUserLimit, AssocMaxSubmitJobLimit, AssocGrpSubmitJobsLimit, ...
    r"sleeping and retrying",  # MaxJobCount of slurm.conf
    r"Resource temporarily unavailable",
)
# Any other limit of a QOS or account is on the size of a job: QOSMaxCpuPerUserLimit, AssocMaxWallDurationPerJobLimit.
_SIZE_LIMIT = r"(QOS|Assoc)(Max|Min|Grp|Resource)\w+"
_PERHAPS_FULL = r"job submit limit"  # "(job submit limit, user's size and/or time limits)": told with every limit
_NO_ANSWER = (
    r"no answer within",
    r"Unable to contact slurm controller",
    r"Socket timed out",
    r"Zero Bytes were transmitted",
    r"Connection (refused|reset|timed out)",
    r"communication (connection )?failure",
    r"Transport endpoint",
    r"in standby mode",
    r"authentication|credential",  # munge restarts, too
    r"nodes are busy|not available now|partition.*(inactive|down)",
)
_FIXES = {
    _SIZE_LIMIT: "the job is larger or longer than the account or QOS allows; ask for less, or change slurm.qos",
    r"invalid partition": "change slurm.partition; `sinfo` lists what there is",
    r"no partition specified|no default partition": "write slurm.partition; `sinfo` lists what there is",
    r"invalid account": "change slurm.account or slurm.partition; `sacctmgr show associations` lists what you may use",
    r"invalid qos": "change slurm.qos; `sacctmgr show associations` lists what you may use",
    r"time limit": "lower slurm.time_minutes; trials go on in the next job",
    r"feature": "change slurm.constraint; `sinfo -o %f` lists what there is",
    r"generic resource|gres": "change slurm.gres or slurm.gpus_per_node; `sinfo -o %G` lists what there is",
    r"memory": "lower slurm.memory_gb",
    r"node count specification|more processors|node configuration": (
        "no such nodes; lower resources.nodes, resources.ranks_per_node, resources.cpus_per_rank, "
        "slurm.gpus_per_node or slurm.memory_gb"
    ),
    r"array": "write `arrays: false`",
    r"invalid node name": "correct slurm.exclude",
    r"(unrecognized|unknown|invalid) (option|argument)|option .* (requires|doesn't)": "correct slurm.options",
}


def refusal(name: str, answer: Answer) -> LaunchError:
    """Build the error of a request that sbatch did not take.

    Args:
        name: of the job, for the message.
        answer: what sbatch said, with an exit code other than 0.
    """
    said = answer.complaint
    if answer.code == COMMAND_NOT_FOUND:
        return LaunchError(f"{name}: sbatch: no such command; run this on a login node of the cluster")
    if _has(said, *_FULL) or (_has(said, _PERHAPS_FULL) and not _has(said, _SIZE_LIMIT)):
        return TryLaterError(f"{name}: Slurm takes no more jobs now: {said}", full=True)
    if _has(said, *_NO_ANSWER):
        return TryLaterError(f"{name}: Slurm does not answer: {said}")
    fix = next((fix for words, fix in _FIXES.items() if _has(said, words)), "")
    return LaunchError(f"{name}: sbatch refused: {said}{f'; {fix}' if fix else ''}")


def _has(said: str, *words: str) -> bool:
    return any(re.search(word, said, re.IGNORECASE) for word in words)
