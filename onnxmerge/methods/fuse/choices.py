"""What can be chosen for a fuse; free of imports, so that the command line can list it at once."""

from enum import StrEnum


class Rule(StrEnum):
    """How aligned weights become one."""

    LEAST_SQUARES = "least-squares"
    AVERAGE = "average"
    TRANSPORT = "transport"
    MTZ = "mtz"
    REPAIR = "repair"


class Targets(StrEnum):
    """What least squares fits a channel to: the mean of matched channels, or one network's channel."""

    MEAN = "mean"
    SELECTED = "selected"


class Matching(StrEnum):
    """What channels are compared by; `none` leaves them in their order."""

    ACTIVATIONS = "activations"
    WEIGHTS = "weights"
    NONE = "none"


class Balance(StrEnum):
    """What becomes of layers without a counterpart."""

    ADD = "add"
    COLLAPSE = "collapse"
    KEEP = "keep"


class Start(StrEnum):
    """What the result is before calibration."""

    FUSED = "fused"
    KEEP = "keep"
    RANDOM = "random"


class LayerCost(StrEnum):
    """What the map between layers minimises."""

    CKA = "cka"
    WIDTH = "width"
    WASSERSTEIN = "wasserstein"
    ORDER = "order"
