"""What trainings come to, step by step, in the files that TensorBoard reads."""

import contextlib
import importlib.util
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from onnxmerge.errors import UsageError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_FLUSH_SECONDS = 10
"""What a killed process loses of its log, at most."""


class Log:
    """Scalars of one training after the other, each in a folder of its own below `folder`.

    A training that goes on, or is run again, appends: what the folder holds of its later steps is then void.
    """

    def __init__(self, folder: Path):
        """Look whether it can be written.

        Raises:
            UsageError: TensorBoard is not installed, or the folder cannot be made.
        """
        if importlib.util.find_spec("tensorboard") is None:
            raise UsageError(
                "a log needs the package tensorboard; install it with: pip install 'onnxmerge[tensorboard]'"
            )
        self._folder, self._training = folder, ""
        self._writer: SummaryWriter | None = None
        with self._writing():
            folder.mkdir(parents=True, exist_ok=True)

    def begin(self, training: str) -> None:
        """What is written from now on belongs to this training."""
        self.close()
        self._training = re.sub(r"[^\w.,+-]+", "-", training).strip("-.")

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write the scalars of a step.

        Raises:
            UsageError: the disk is full or the folder cannot be written.
        """
        with self._writing():
            if self._writer is None:
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(self._folder / self._training, purge_step=step, flush_secs=_FLUSH_SECONDS)
            for name, value in scalars.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """End the training.

        Raises:
            UsageError: see `write`.
        """
        writer, self._writer = self._writer, None
        if writer is not None:
            with self._writing():
                writer.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UsageError(f"{self._folder}: cannot write the log: {error.strerror or error}") from error
