"""Finished candidates on disk, so that an interrupted run is reported and can be resumed."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from onnxmerge.calibration.settings import Checkpoint
from onnxmerge.files import write_text
from onnxmerge.report.provenance import sha256
from onnxmerge.report.schema import Candidate, Result


class Interrupted(KeyboardInterrupt):
    """The run was interrupted; what was finished is written and is in `result`."""

    def __init__(self, result: Result):
        super().__init__("interrupted")
        self.result = result


class Shelf:
    """The candidates of one output folder: beside each model `NAME.onnx` a record `NAME.json` with both hashes.

    Of one that is still being calibrated there is only `NAME.checkpoint`.

    Args:
        folder: the output folder.
        recipe: only candidates made by the same recipe are taken again.
        resume: whether earlier ones are looked for at all.
    """

    def __init__(self, folder: Path, recipe: Mapping[str, Any], *, resume: bool):
        self._folder = folder
        self._fingerprint = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
        self._resume = resume

    def model_path(self, name: str) -> Path:
        """Where the model of candidate `name` is."""
        return self._folder / f"{name}.onnx"

    def checkpoint(self, name: str) -> Checkpoint:
        """Where candidate `name` is kept while it is calibrated."""
        return Checkpoint(self._folder / f"{name}.checkpoint", self._fingerprint, self._resume)

    def get(self, name: str) -> Candidate | None:
        """The finished candidate `name` of an earlier run with the same recipe, if it is there and undamaged."""
        record = self._folder / f"{name}.json"
        if not self._resume or not record.is_file() or not self.model_path(name).is_file():
            return None
        try:
            stored = json.loads(record.read_text(encoding="utf-8"))
            same = stored["fingerprint"] == self._fingerprint and stored["sha256"] == sha256(self.model_path(name))
            return Candidate.model_validate(stored["candidate"]) if same else None
        except (KeyError, TypeError, ValueError, ValidationError):
            return None

    def put(self, candidate: Candidate) -> None:
        """Record a finished candidate, whose model is written already."""
        record = {
            "fingerprint": self._fingerprint,
            "sha256": sha256(self.model_path(candidate.name)),
            "candidate": candidate.model_dump(mode="json"),
        }
        write_text(self._folder / f"{candidate.name}.json", json.dumps(record, indent=2) + "\n")
        self.checkpoint(candidate.name).path.unlink(missing_ok=True)
