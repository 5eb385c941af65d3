"""quantize: one model in 8-bit integers or float16, with what that costs each of its tasks."""

import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as oir

from onnxmerge.errors import ModelError, UsageError
from onnxmerge.files import claim_file
from onnxmerge.ir.labels import dims
from onnxmerge.ir.layers import find_layers, parameter_count
from onnxmerge.ir.load import load, read
from onnxmerge.ir.reach import needed, remove_unneeded
from onnxmerge.ir.save import save, stored_bytes
from onnxmerge.ir.shapes import infer_shapes
from onnxmerge.ir.stored import is_external
from onnxmerge.ir.weights import add_initializer
from onnxmerge.methods.bounds import Bounds, score_checks
from onnxmerge.methods.measure import Judge, unreliable_note
from onnxmerge.methods.parts import Part, part_outputs, parts_of
from onnxmerge.methods.same import Runs
from onnxmerge.methods.scoring import Tally
from onnxmerge.passes.fold_batch_norm import FoldBatchNorm
from onnxmerge.report.provenance import hardware, library_versions
from onnxmerge.report.recipe import Made, as_recipe, hashes, step_of, with_steps
from onnxmerge.report.schema import BoundCheck, Candidate, InputRecord, LatencyRecord, Result
from onnxmerge.runtime.latency import latency
from onnxmerge.runtime.quantize import Ranges, join_ranges, measure_ranges, quantize_int8, to_float16
from onnxmerge.scratch import scratch

_BATCH = 8
"""Samples run at once when ranges are measured."""
_NO_DATA = "noise"
_FLOAT16 = float(np.finfo(np.float16).max)


def quantize_model(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    to: Literal["int8", "float16"],
    data: Sequence[str] = (),
    *,
    samples: int = 256,
    keep: Sequence[str] = (),
    max_drop: float | None = None,
    measure: bool = True,
    seed: int = 0,
    threads: int | None = None,
    providers: Sequence[str] = ("cpu",),
    overwrite: bool = False,
) -> tuple[Result, list[str]]:
    """Write the model at `model` in lower precision to `output`, and score it against the model on held-out samples.

    For int8 every task's samples give the ranges of what its outputs depend on: what tasks share gets the range over
    all of them, a task's own tail and head that of its own samples.

    Args:
        model: the ONNX file; the tasks of a merged one are told apart by its metadata.
        output: the `.onnx` file. Inputs, outputs and metadata stay.
        to: the precision.
        data: `D` for all tasks, `TASK=D` for one; float16 needs none.
        samples: of each task that ranges are taken from; for float16 to see that it holds them.
        keep: layers or nodes that stay in float32.
        max_drop: largest loss of the worst task; the output is not written where it is larger.
        measure: whether latency is measured.
        seed: of the choice of samples.
        threads: for onnxruntime.
        providers: where both models run, when they are scored and timed.
        overwrite: replace the files of an earlier run.

    Returns:
        The result, with the quantized model as its only candidate, and one sentence for each broken bound.

    Raises:
        UsageError: the output exists, or data or a layer's name do not fit.
        ModelError: the model cannot be read or quantized, or its outputs are no numbers any more.
    """
    begun = time.perf_counter()
    path = Path(model)
    if to == "int8" and not data:
        raise UsageError("int8 needs samples to find the ranges of values: give --data")
    stored, plain = read(path), load(path)
    if any(node.op_type == "QuantizeLinear" for node in stored.graph.all_nodes()):
        raise UsageError(f"{path}: is quantized already")
    oir.external_data.load_to_model(plain)  # its tasks run from memory
    count = parameter_count(plain)
    FoldBatchNorm()(plain)
    kept = _nodes(plain, keep, path)
    parts = parts_of(path, plain, data or [_NO_DATA], seed=seed)
    drawn = {"samples": samples, "seed": seed} if to == "int8" else {}
    given = {"model": path, "to": to, "data": data, "keep": keep, "max_drop": max_drop, **drawn}
    step = step_of("quantize", hashes([path]), given)
    metadata = with_steps(stored.metadata_props, step)
    claimed = claim_file(output, overwrite=overwrite)
    with claimed as target, scratch() as folder:
        made = _made(plain, parts, to, kept, folder, samples, seed, beside=is_external(stored))
        file = folder / target.name
        save(made, file, metadata, beside=is_external(stored))
        Runs(path, seed, threads).check_interface(Runs(file, seed, threads), f"{path} in {to}")
        judge = Judge(
            parts,
            folder,
            threads,
            samples=None if data else samples,
            seed=seed,
            outputs=part_outputs(parts),
            providers=providers,
        )
        low = read(file)
        oir.external_data.load_to_model(low)
        tallies = {part.name: judge.tally(part, low, {}) for part in parts}
        _check_finite(tallies, to)
        record, reliable = LatencyRecord(), True
        if measure:
            record, reliable = _latency(file, path, parts, plain, threads, providers)
        candidate = Candidate(
            name=to,
            share=int(stored.metadata_props.get("onnxmerge.share", "0")),
            path=str(target),
            parameters=count,
            bytes=stored_bytes(file),
            tasks={task: tally.score() for task, tally in tallies.items()},
            latency_ms=record,
            steps=0,
            seconds=time.perf_counter() - begun,
        )
        bounds = Bounds(max_drop=max_drop)
        checks = [
            check for n, score in candidate.tasks.items() for check in score_checks(str(target), n, score, bounds)
        ]
        notes = [] if reliable else [unreliable_note(target)]
        notes += [f"The samples of {part.name} are made up: they say little." for part in parts if part.data.stand_in]
        result = _result(path, target, parts, candidate, notes, step, checks)
        if result.chosen is not None:
            save(made, target, metadata, beside=is_external(stored))
    return result, result.broken


def _nodes(model: oir.Model, keep: Sequence[str], path: Path) -> list[str]:
    """The names of the nodes that `keep` names, or whose layers it names."""
    layers = {layer.name: layer.node.name or "" for layer in find_layers(model)}
    nodes = {node.name or "" for node in model.graph}
    for name in keep:
        if name not in layers and name not in nodes:
            raise UsageError(f"--keep {name}: {path} has no such layer or node; its layers are {', '.join(layers)}")
    return [layers.get(name, name) for name in keep]


def _made(
    plain: oir.Model,
    parts: Sequence[Part],
    to: str,
    keep: Sequence[str],
    folder: Path,
    samples: int,
    seed: int,
    *,
    beside: bool,
) -> oir.Model:
    """The quantized model, with external data in `folder`."""
    separate = plain.clone()
    _one_reader(separate)
    source, made = folder / "plain.onnx", folder / "made.onnx"
    oir.save(separate, source, external_data=f"{source.name}.data" if beside else None)
    ranges = []
    for part in parts:
        feeds = part.merged_feeds(part.data.calibration.take(samples, seed), separate)
        own = measure_ranges(source, feeds.batches(_batch(separate)), everywhere=to == "float16")
        ranges.append(_seen(separate, part, own))
    if to == "float16":
        _check_float16(separate, join_ranges(ranges), keep)
        to_float16(source, made, keep)
    else:
        quantize_int8(source, made, join_ranges(ranges), keep)
    model = read(made)
    if to == "float16":
        _drop_round_trips(model)
    for key in set(model.metadata_props) - set(plain.metadata_props):  # the tools leave notes to themselves
        del model.metadata_props[key]
    return model


def _drop_round_trips(model: oir.Model) -> None:
    """Let what reads float32 that came through float16 read it as it was: the tool casts around every kept node."""
    infer_shapes(model)
    for node in list(model.graph):
        inner = node.inputs[0].producer() if _casts(node, oir.DataType.FLOAT) and node.inputs[0] is not None else None
        source = inner.inputs[0] if inner is not None and _casts(inner, oir.DataType.FLOAT16) else None
        if source is not None and source.dtype == oir.DataType.FLOAT and not node.outputs[0].is_graph_output():
            node.outputs[0].replace_all_uses_with(source)
    remove_unneeded(model)


def _casts(node: oir.Node, to: oir.DataType) -> bool:
    return node.op_type == "Cast" and node.attributes["to"].as_int() == to


def _one_reader(model: oir.Model) -> None:
    """Give each reader of a constant its own: the tools name what they put before it after the constant alone."""
    for name, value in list(model.graph.initializers.items()):
        for number, (node, index) in enumerate(list(value.uses())[1:], start=1):
            if value.const_value is not None and node.graph is model.graph:
                own = add_initializer(model.graph, f"{name}__alone{number}", value.const_value.numpy())
                node.replace_input_with(index, own)


def _batch(model: oir.Model) -> int:
    sizes = [dims(value)[0] for value in model.graph.inputs]
    return next((size for size in sizes if size is not None), _BATCH)


def _seen(model: oir.Model, part: Part, ranges: Ranges) -> Ranges:
    """The ranges of what the part's outputs depend on."""
    outputs = [value for value in model.graph.outputs if value.name in part.outputs]
    values = {value.name for node in needed(outputs) for value in (*node.inputs, *node.outputs) if value is not None}
    return {name: own for name, own in ranges.items() if name in values}


def _check_float16(model: oir.Model, ranges: Ranges, keep: Sequence[str]) -> None:
    """See that values fit into float16, where onnxruntime would compute in it: on the CPU it mostly does not.

    Raises:
        ModelError: one does not, and not all nodes that make or read it stay in float32.
    """
    for node in model.graph:
        for value in node.outputs:
            reach = max((float(np.abs(end).max()) for end in ranges.get(value.name or "", ())), default=0.0)
            around = [node, *(reader for reader, _ in value.uses())]
            if reach > _FLOAT16 and not all(own.name in keep for own in around):
                names = ", ".join(str(own.name) for own in around)
                raise ModelError(
                    f"the value {value.name!r} reaches {reach:.3g}, more than float16 holds ({_FLOAT16:g}); "
                    f"--keep what makes and reads it in float32: {names}"
                )


def _check_finite(tallies: Mapping[str, Tally], to: str) -> None:
    for task, tally in tallies.items():
        if not all(math.isfinite(gap) for gap in tally.differences):
            raise ModelError(f"the outputs of {task} are not finite in {to}; --keep leaves layers in float32")


def _latency(
    file: Path, path: Path, parts: Sequence[Part], model: oir.Model, threads: int | None, providers: Sequence[str]
) -> tuple[LatencyRecord, bool]:
    """Milliseconds of both files for one sample, in turn, and whether they are reliable."""
    feeds: dict[str, np.ndarray] = {}
    for part in reversed(parts):  # what all read is the first task's
        own = next(part.merged_feeds(part.data.held_out, model).batches(1))
        feeds = {**own, **feeds, **{name: own[name] for name in part.called.values()}}
    found = latency(file, [path], feeds, [feeds], threads=threads, providers=providers)
    record = LatencyRecord(
        merged=found.merged, separate=found.separate, separate_default=found.separate_default, speedup=found.speedup
    )
    return record, found.reliable


def _result(
    path: Path,
    target: Path,
    parts: Sequence[Part],
    candidate: Candidate,
    notes: Sequence[str],
    step: Made,
    checks: Sequence[BoundCheck],
) -> Result:
    record = InputRecord(
        task=parts[0].name if len(parts) == 1 else path.stem,
        path=str(path),
        sha256=step.files[str(path)],
        parameters=candidate.parameters,
        bytes=stored_bytes(path),
    )
    result = Result(
        method="quantize",
        versions=library_versions(),
        inputs=[record],
        candidates=[candidate],
        chosen=None,
        recipe=as_recipe([step], target),
        hardware=hardware(),
        notes=list(notes),
        checks=list(checks),
    )
    result.chosen = None if result.broken else candidate.name
    result.notes += result.broken
    return result
