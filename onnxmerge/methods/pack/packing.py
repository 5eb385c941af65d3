"""Several models in one graph: the recipe of passes behind pack, on models in memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as oir
from onnx_ir.passes import common

from onnxmerge.errors import ModelError, UsageError
from onnxmerge.ir.compose import move
from onnxmerge.ir.fold_stored import fold_stored
from onnxmerge.ir.light import give_outputs_nodes, raise_light_opset
from onnxmerge.ir.normalise import infer_shapes
from onnxmerge.ir.reach import needed, reads
from onnxmerge.ir.sizes import Equalities, rename_sizes, sizes_of
from onnxmerge.passes.attach_tails import SHARED
from onnxmerge.passes.deduplicate_initializers import DeduplicateInitializers
from onnxmerge.passes.merge_identical_nodes import MergeIdenticalNodes
from onnxmerge.passes.prefix_names import PrefixNames
from onnxmerge.passes.tie_inputs import TieInputs, fits

Endpoint = tuple[str, str]
"""A task and the name of one of its inputs."""


@dataclass(frozen=True)
class Packed:
    """A packed model.

    Attributes:
        model: its outputs are called `TASK/output`.
        inputs: for each task its own input names, in order, and what the packed model calls them.
        nodes: number of nodes of each task that are computed for several tasks, and of all its nodes.
        notes: sentences about inputs that were kept apart.
    """

    model: oir.Model
    inputs: dict[str, dict[str, str]]
    nodes: dict[str, tuple[int, int]]
    notes: list[str]


def pack_graphs(models: Mapping[str, oir.Model], asked: Sequence[Sequence[Endpoint]], *, separate: bool) -> Packed:
    """Put models in the light normal form into one graph and share what is equal; the models are used up.

    Args:
        models: by task.
        asked: groups of inputs that shall be one; inputs of equal names, types and shapes are tied besides.
        separate: tie no input that is not in `asked`.

    Raises:
        UsageError: inputs that shall be one contradict each other.
        ModelError: the models use different versions of a custom operator set, or cannot be brought to one opset.
    """
    merged, inputs, notes = _side_by_side(models, asked, separate)
    DeduplicateInitializers()(merged)
    MergeIdenticalNodes()(merged)
    while fold_stored(merged):
        infer_shapes(merged)
    DeduplicateInitializers()(merged)
    MergeIdenticalNodes()(merged)
    nodes = _name_shared(merged, list(models))
    common.NameFixPass()(merged)
    return Packed(merged, inputs, nodes, notes)


def unshared_graph(models: Mapping[str, oir.Model]) -> tuple[oir.Model, dict[str, dict[str, str]]]:
    """Models in the light normal form side by side in one graph that shares nothing; they are used up.

    Returns:
        The graph, and for each task what its inputs are called in it: none is read by two tasks.

    Raises:
        ModelError: as `pack_graphs` does.
    """
    graph, inputs, _ = _side_by_side(models, [], True)
    common.NameFixPass()(graph)
    return graph, inputs


def _side_by_side(
    models: Mapping[str, oir.Model], asked: Sequence[Sequence[Endpoint]], separate: bool
) -> tuple[oir.Model, dict[str, dict[str, str]], list[str]]:
    """All models in one graph with their inputs tied; what the tasks' inputs are called, and notes as in `Packed`."""
    merged = _join(models)
    groups, notes = _group_inputs(merged, list(models), asked, separate)
    called = {member: name for name, members in groups.items() for member in members}
    names = {task: [i.removeprefix(f"{task}/") for i in called if i.startswith(f"{task}/")] for task in models}
    inputs = {task: {name: called[f"{task}/{name}"] for name in own} for task, own in names.items()}
    TieInputs(groups)(merged)
    _drop_prefixes_of_symbols(merged, list(models))
    infer_shapes(merged)
    common.RemoveUnusedNodesPass()(merged)
    return merged, inputs, notes


def _join(models: Mapping[str, oir.Model]) -> oir.Model:
    """All models side by side in one graph, every name with its task's prefix."""
    opset = max(model.opset_imports.get("", 1) for model in models.values())
    versions: dict[str, tuple[str, int]] = {}
    graph = oir.Graph([], [], nodes=[], opset_imports={"": opset}, name="onnxmerge")
    ir_version = 0
    for task, model in models.items():
        try:
            raise_light_opset(model, opset)
        except ModelError as error:
            raise ModelError(f"{task}: {error}") from error
        for domain, version in model.opset_imports.items():
            other, known = versions.setdefault(domain, (task, version))
            if known != version and domain:
                raise ModelError(
                    f"{other} uses version {known} of the operator set {domain!r} and {task} version {version}; "
                    "only those of the standard set can be converted"
                )
            graph.opset_imports[domain] = version
        PrefixNames(f"{task}/")(model)
        give_outputs_nodes(model.graph)
        ir_version = max(ir_version, model.ir_version or 0)
        inputs, outputs = list(model.graph.inputs), list(model.graph.outputs)
        model.graph.inputs.clear()
        model.graph.outputs.clear()
        move(model.graph, graph)
        graph.inputs.extend(inputs)
        graph.outputs.extend(outputs)
    return oir.Model(graph, ir_version=ir_version, producer_name="onnxmerge")


def _group_inputs(
    merged: oir.Model, tasks: Sequence[str], asked: Sequence[Sequence[Endpoint]], separate: bool
) -> tuple[dict[str, list[str]], list[str]]:
    """Which inputs become one: new name -> present names; and a note for each that could not be tied."""
    values = {value.name or "": value for value in merged.graph.inputs}
    endpoints = [(task, name.removeprefix(f"{task}/")) for name in values for task in [_task_of(name, tasks)]]
    equal = Equalities()
    groups: list[list[Endpoint]] = []
    notes = []

    def join(group: list[Endpoint], endpoint: Endpoint) -> bool:
        nonlocal equal
        trial = equal.copy()
        if not all(fits(values["/".join(member)], values["/".join(endpoint)], trial) for member in group):
            return False
        equal = trial
        group.append(endpoint)
        return True

    for wanted in asked:
        groups.append([])
        for endpoint in wanted:
            if not join(groups[-1], endpoint):
                first = groups[-1][0]
                raise UsageError(
                    f"--share-input: {_described(first, values)} and {_described(endpoint, values)} cannot be one input"
                )
    for endpoint in endpoints:
        if any(endpoint in group for group in groups):
            continue
        alike = [] if separate else [group for group in groups if any(name == endpoint[1] for _, name in group)]
        free = [group for group in alike if all(task != endpoint[0] for task, _ in group)]
        if any(join(group, endpoint) for group in free):
            continue
        groups.append([endpoint])
        if alike:
            notes.append(
                f"{_described(endpoint, values)} is not tied to {_described(alike[0][0], values)}: "
                + ("their types or shapes contradict each other." if free else "that one is tied to another already.")
            )
    groups.sort(key=lambda group: min(endpoints.index(endpoint) for endpoint in group))
    return _name_groups(groups, {value.name or "" for value in merged.graph.outputs}, separate), notes


def _name_groups(groups: Sequence[Sequence[Endpoint]], taken: set[str], separate: bool) -> dict[str, list[str]]:
    """A group is called after its first input; `TASK/input` where it stands alone among others of that name."""
    of_name: dict[str, list[Sequence[Endpoint]]] = {}
    for group in groups:
        of_name.setdefault(group[0][1], []).append(group)
    named: dict[str, list[str]] = {}
    for group in groups:
        task, name = group[0]
        alike = of_name[name]
        tied = [other for other in alike if len(other) > 1]
        plain = group is tied[0] if tied else len(alike) == 1 and not separate
        chosen = name if plain and name not in taken | named.keys() else f"{task}/{name}"
        while chosen in taken | named.keys():
            chosen = f"{chosen}_input"
        named[chosen] = ["/".join(endpoint) for endpoint in group]
    return named


def _task_of(name: str, tasks: Sequence[str]) -> str:
    return next(task for task in tasks if name.startswith(f"{task}/"))


def _described(endpoint: Endpoint, values: Mapping[str, oir.Value]) -> str:
    value = values["/".join(endpoint)]
    prefix = f"{endpoint[0]}/"
    sizes = ["?" if size is None else str(size).removeprefix(prefix) for size in sizes_of(value) or []]
    kind = value.dtype.name.lower() if value.dtype is not None else str(value.type)
    return f"{endpoint[0]}:{endpoint[1]} ({kind} [{', '.join(sizes)}])"


def _drop_prefixes_of_symbols(model: oir.Model, tasks: Sequence[str]) -> None:
    """Give symbolic axes their own names again where no two different symbols had the same."""
    short: dict[str, str] = {}
    for value in [*model.graph.inputs, *model.graph.outputs]:
        for size in sizes_of(value) or []:
            if isinstance(size, str) and size not in short:
                plain = size.removeprefix(f"{_task_of(size, tasks)}/")
                short[size] = size if plain in short.values() else plain
    rename_sizes(model, lambda size: short.get(size, size))


def _name_shared(model: oir.Model, tasks: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Put `shared/` in the place of the task's name before nodes, values and weights that serve several tasks.

    Returns:
        For each task how many of its nodes serve other tasks too, and how many it has.
    """
    graph = model.graph
    of_task = {
        task: needed([value for value in graph.outputs if (value.name or "").startswith(f"{task}/")]) for task in tasks
    }
    serves: dict[oir.Node, list[str]] = {}
    for task, nodes in of_task.items():
        for node in nodes:
            serves.setdefault(node, []).append(task)
    for node in graph:
        if len(serves[node]) > 1:
            node.name = _shared_name(node.name or "", tasks)
            for value in node.outputs:
                if value.name and not value.is_graph_output():
                    value.name = _shared_name(value.name, tasks)
    readers: dict[oir.Value, set[str]] = {}
    for node in graph:
        for value in reads(node):
            readers.setdefault(value, set()).update(serves[node])
    for value in list(graph.initializers.values()):
        name = _shared_name(value.name or "", tasks)
        if len(readers.get(value, ())) > 1 and name not in graph.initializers:
            value.name = name
    return {task: (sum(len(serves[node]) > 1 for node in nodes), len(nodes)) for task, nodes in of_task.items()}


def _shared_name(name: str, tasks: Sequence[str]) -> str:
    owner = next((task for task in tasks if name.startswith(f"{task}/")), None)
    return name if owner is None else f"{SHARED}{name.removeprefix(f'{owner}/')}"
