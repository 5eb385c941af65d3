"""zip in weights mode: one walk shares unit after unit, and each candidate goes on from the one before."""

import itertools
import json

import onnx_ir as oir

from onnxmerge.methods.zip.choices import Pairing
from onnxmerge.methods.zip.fictive import sized_for, with_fictive
from onnxmerge.methods.zip.job import Fitted, Job
from onnxmerge.methods.zip.plan import PlannedCandidate
from onnxmerge.methods.zip.weights.begun import LOST_NAMES, Begun, lost_names, read_candidate
from onnxmerge.methods.zip.weights.settings import WeightSharing
from onnxmerge.methods.zip.weights.share import share_weights


class WeightsMode:
    """See `Maker`.

    Args:
        job: the zip.
    """

    def __init__(self, job: Job):
        self._job = job

    def fit(self, planned: PlannedCandidate) -> Fitted:
        """What the candidate shares beyond the one that it goes on from is shared, layer by layer."""
        job, own = self._job, self._job.settings
        if own.pairing is Pairing.CORRELATION:
            job.align(with_fictive(job.tasks) if job.sharable.fictive else job.tasks)
        job.progress.stage(f"{planned.name}: fit", None)
        tasks, sharable = sized_for(job.tasks, job.sharable, planned.units)

        numbers = itertools.count(1)

        def after(merged: oir.Model, layer: str) -> None:
            checkpoint = job.shelf.checkpoint(planned.name, next(numbers))
            job.calibrate(f"{planned.name}, {layer}", merged, tasks, own.retrain, checkpoint)

        merged = share_weights(
            sharable,
            job.aligned,
            tasks,
            planned.channels or planned.units,
            WeightSharing(
                rule=own.rule,
                pairing=own.pairing,
                samples=own.samples,
                seed=own.seed,
                threads=own.threads,
                weights=own.weights,
                max_difference=own.max_difference,
            ),
            begun=self._begun(planned),
            after=after if own.retrain else None,
            progress=job.progress,
        )
        return Fitted(merged.model, tasks, None, {} if own.max_difference is None else dict(merged.counts))

    def _begun(self, planned: PlannedCandidate) -> Begun | None:
        """The finished candidate that this one goes on from: of those that share fewer units the last."""
        job = self._job
        units = {own.name: own.units for own in job.plan.candidates if not own.channels and own.units < planned.units}
        finished = [own for own in job.finished if units.get(own.name)]
        if planned.channels or not finished:
            return None
        last = max(finished, key=lambda own: own.share)
        model = read_candidate(job.shelf.model_path(last.name))
        return Begun(last.share, last.channels, model, *sized_for(job.tasks, job.sharable, last.share))

    def metadata(self, planned: PlannedCandidate, merged: oir.Model) -> dict[str, str]:
        """Names that `save` will not keep."""
        return {LOST_NAMES: json.dumps(lost_names(merged))}

    def macs(self, merged: oir.Model) -> int | None:
        """As many as the originals."""
        return self._job.plan.originals.macs
