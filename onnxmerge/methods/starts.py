"""Where the shared stem of a zip begins; light, because the command line imports it."""

from enum import StrEnum


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
