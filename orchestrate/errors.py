"""Every error meant for a user; each prints as one message without a traceback.

OrchestrateError
├── ConfigError       a YAML file or an option is wrong (exit 2)
├── DataError         a dataset is missing, empty or damaged (exit 2)
│   └── StorageError  a store did not answer within its retries: go on later (exit 74)
├── LoaderError       a process that makes views died: go on later (exit 74)
├── RunDirError       a RunDir belongs to another config or cannot be written (exit 2)
│   └── BusyError     another process works on it: go on later (exit 74)
├── PreflightError    a node is not fit to run: go on elsewhere (exit 87)
├── CheckpointError   a checkpoint cannot be used
├── LaunchError       a launcher could not start, find or stop a job
├── StoreError        the store is locked or of another schema
└── DivergedError     the loss is not finite: a result of the trial, not a fault of the machine (exit 88)
"""


class OrchestrateError(Exception):
    """Name the thing, the value and the fix."""

    exit_code = 1


class ConfigError(OrchestrateError):
    """Say which key of which file is wrong, and what to write instead."""

    exit_code = 2


class DataError(OrchestrateError):
    """Say which dataset, shard or sample is wrong."""

    exit_code = 2


class StorageError(DataError):
    """Say which URL did not answer, and how often it was asked."""

    exit_code = 74  # EX_IOERR of sysexits.h


class LoaderError(OrchestrateError):
    """Say that a process which makes views died, and why that may be."""

    exit_code = 74


class RunDirError(OrchestrateError):
    """Say which RunDir cannot be used, and why."""

    exit_code = 2


class BusyError(RunDirError):
    """Say which RunDir another process works on, and who; it may be of a node that the cluster has lost."""

    exit_code = 74


class PreflightError(OrchestrateError):
    """Say what is wrong with which node.

    Attributes:
        check: that this process's own node failed; empty if it is another rank's.
    """

    exit_code = 87

    def __init__(self, problem: str, *, check: str = "") -> None:
        super().__init__(problem)
        self.check = check


class CheckpointError(OrchestrateError):
    """Say which checkpoint cannot be used, and why."""


class LaunchError(OrchestrateError):
    """Say which job could not be started, found or stopped."""


class StoreError(OrchestrateError):
    """Say which store cannot be used, and why."""


class DivergedError(OrchestrateError):
    """Name the loss term and the step at which a value stopped being finite."""

    exit_code = 88
