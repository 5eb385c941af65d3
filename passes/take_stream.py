"""Take one task's stream out of a model in which the tasks are stacked (exact for that task).

What `StackTasks` stacks is that task's value alone again: the shared weights see one batch, and nodes of other tasks
are needed no more. The outputs of the other tasks are wrong afterwards; they are to be removed.
"""

import onnx_ir as oir

from onnxmerge.passes.stack_tasks import STACK, UNSTACK


class TakeStream(oir.passes.InPlacePass):
    """Undo the stacking for one of the tasks of a merged model that still has all its outputs.

    Args:
        task: the prefix of its outputs.
    """

    preserves = "exact"

    def __init__(self, task: str):
        self.task = task

    def call(self, model: oir.Model) -> oir.passes.PassResult:
        """Bypass every node that stacks or unstacks."""
        tasks = list(dict.fromkeys((value.name or "").split("/")[0] for value in model.graph.outputs))
        number, modified = tasks.index(self.task), False
        for node in list(model.graph):
            stacks = node.op_type == "Concat" and (node.name or "").endswith(STACK)
            unstacks = node.op_type == "Split" and (node.name or "").endswith(UNSTACK)
            if stacks:
                source, made = node.inputs[number], node.outputs[0]
            elif unstacks:
                source, made = node.inputs[0], node.outputs[number]
            else:
                continue
            assert source is not None
            made.replace_all_uses_with(source)
            modified = True
        return oir.passes.PassResult(model, modified)
