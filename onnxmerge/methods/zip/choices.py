"""What can be chosen by name in a zip; light, because the command line imports it."""

from enum import StrEnum

TREE = "tree"
"""What `--share` says when groups of tasks may share further."""


class Start(StrEnum):
    """Where a stem's weights come from, before calibration."""

    SUBSPACE = "subspace"
    """Every space a linear map of all networks' channels, every layer refitted to it."""
    LEAST_SQUARES = "least-squares"
    """Matched channels, every layer refitted towards each task's own on its own samples."""
    REPAIR = "repair"
    AVERAGE = "average"
    """The mean of matched channels."""
    KEEP = "keep"
    """The reference's own stem, as it is: its task stays exact."""


class Mode(StrEnum):
    """What sharing means."""

    COMPUTE = "compute"
    """Shared channels are computed once."""
    WEIGHTS = "weights"
    """Shared weights are held once, and every task keeps its own stream of activations."""


class Rule(StrEnum):
    """How shared weights are made; see `onnxmerge.passes.shared_weights`."""

    LEAST_SQUARES = "least-squares"
    MTZ = "mtz"


class Pairing(StrEnum):
    """How neurons are paired."""

    CORRELATION = "correlation"
    """As `align` did, by the correlation of activations."""
    GREEDY = "greedy"
    """By MTZ's functional difference, the cheapest pair first, as published."""
    ASSIGNMENT = "assignment"
    """By MTZ's functional difference, the least sum."""
