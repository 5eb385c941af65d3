"""What can be chosen for a fuse; free of imports, so that the command line can list it at once."""

from enum import StrEnum


class Rule(StrEnum):
    """How aligned weights become one."""

    LEAST_SQUARES = "least-squares"
    AVERAGE = "average"
    TRANSPORT = "transport"
    MTZ = "mtz"
    REPAIR = "repair"


class Matching(StrEnum):
    """What channels are compared by."""

    ACTIVATIONS = "activations"
    WEIGHTS = "weights"


class Balance(StrEnum):
    """What becomes of layers without a counterpart, where a rule mixes weights."""

    ADD = "add"
    COLLAPSE = "collapse"
