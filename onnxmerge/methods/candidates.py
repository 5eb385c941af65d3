"""Finished candidates on disk, so that an interrupted run is reported and can be resumed."""

import glob
import json
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as oir
from pydantic import ValidationError

from onnxmerge.calibration.settings import Checkpoint
from onnxmerge.files import write_text
from onnxmerge.ir.save import save
from onnxmerge.methods.recipe import Recipe
from onnxmerge.report.provenance import sha256
from onnxmerge.report.schema import Candidate, Result


class Interrupted(KeyboardInterrupt):
    """The run was interrupted; what was finished is written and is in `result`."""

    def __init__(self, result: Result):
        super().__init__("interrupted")
        self.result = result


class Shelf:
    """The candidates of one output folder: beside each model `NAME.onnx` a record `NAME.json` with both hashes.

    Of one that is still being calibrated there is only `NAME.checkpoint`, and where layers were trained before, a
    `NAME.layerN.checkpoint` for each.

    Args:
        folder: the output folder.
        recipe: every model carries it; only candidates made by the same one are taken again.
        resume: whether earlier ones are looked for at all.
    """

    def __init__(self, folder: Path, recipe: Recipe, *, resume: bool):
        self._folder = folder
        self._recipe = recipe
        self._fingerprint = recipe.fingerprint
        self._resume = resume

    def model_path(self, name: str) -> Path:
        """Where the model of candidate `name` is."""
        return self._folder / f"{name}.onnx"

    def checkpoint(self, name: str, layer: int | None = None) -> Checkpoint:
        """Where candidate `name` is kept while it is calibrated, or trained after its shared layer of this number."""
        part = "" if layer is None else f".layer{layer}"
        return Checkpoint(self._folder / f"{name}{part}.checkpoint", self._fingerprint, self._resume)

    def get(self, name: str) -> Candidate | None:
        """The finished candidate `name` of an earlier run with the same recipe, if it is there and undamaged."""
        record = self._folder / f"{name}.json"
        if not self._resume or not record.is_file() or not self.model_path(name).is_file():
            return None
        try:
            stored = json.loads(record.read_text(encoding="utf-8"))
            same = stored["fingerprint"] == self._fingerprint and stored["sha256"] == self._hashes(name)
            return Candidate.model_validate(stored["candidate"]) if same else None
        except (KeyError, TypeError, ValueError, ValidationError):
            return None

    def write(self, name: str, model: oir.Model, metadata: Mapping[str, str] | None = None) -> Path:
        """Write the model of candidate `name`; what it carries of its recipe, and `metadata`, stand in it."""
        path = self.model_path(name)
        save(model, path, self._recipe.metadata() | dict(metadata or {}))
        return path

    def put(self, candidate: Candidate) -> None:
        """Record a finished candidate, whose model is written already."""
        record = {
            "fingerprint": self._fingerprint,
            "sha256": self._hashes(candidate.name),
            "candidate": candidate.model_dump(mode="json"),
        }
        write_text(self._folder / f"{candidate.name}.json", json.dumps(record, indent=2) + "\n")
        self.checkpoint(candidate.name).path.unlink(missing_ok=True)
        for checkpoint in self._folder.glob(f"{glob.escape(candidate.name)}.layer*.checkpoint"):
            checkpoint.unlink()

    def choose(self, name: str | None) -> None:
        """Make candidate `name` the folder's merged.onnx; None: leave it without one."""
        merged = self.model_path("merged")
        if name is not None:
            save(oir.load(self.model_path(name)), merged)
            return
        for old in (merged, _data_of(merged)):
            old.unlink(missing_ok=True)

    def _hashes(self, name: str) -> list[str]:
        """Of a candidate's model, and of the file with its weights where there is one."""
        path = self.model_path(name)
        return [sha256(file) for file in (path, _data_of(path)) if file.is_file()]


def _data_of(model: Path) -> Path:
    return model.with_name(f"{model.name}.data")
