"""The errors a user can meet, each with the exit code the command line promises.

Every message is one sentence that names the file, node or array at fault.
"""


class OnnxMergeError(Exception):
    """Base of all errors raised on purpose; on its own it means a fault of ours (exit code 4)."""

    exit_code = 4


class GateFailed(OnnxMergeError):
    """Bounds were not met (exit code 1); it takes one sentence for each."""

    exit_code = 1


class UsageError(OnnxMergeError):
    """The command, the configuration or the data do not fit (exit code 2)."""

    exit_code = 2


class ModelError(OnnxMergeError):
    """A model or an operator that cannot be handled (exit code 3)."""

    exit_code = 3
