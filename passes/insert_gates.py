"""Insert gates: every layer reads its input times gates, which become inputs of the network (exact while they are 1).

For a value f of shape [N, ..., C, ...] that layers read, the network gets an input of shape [G, 1, ..., C, ..., 1],
where G is 1 or N (a gate for each sample), and these layers read f * g. What else reads f, such as a skip, gets f
itself (see `gate_places`).
"""

import onnx_ir as oir

from onnxmerge.passes.gate_places import GatePlaces


def gate_input(value: str) -> str:
    """The name of the input that gates the value of that name."""
    return f"gate/{value}"


class InsertGates(oir.passes.FunctionalPass):
    """Put gates before the layers of the model that `places` was found for."""

    preserves = "exact"

    def __init__(self, places: GatePlaces):
        self.places = places

    def call(self, model: oir.Model) -> oir.passes.PassResult:
        """A gated copy of the model."""
        gated = model.clone()
        nodes = list(gated.graph)
        for own in self.places.values:
            readers = [nodes[number] for number in own.readers]
            value = readers[0].inputs[0]
            assert value is not None
            shape: list[int | str] = [1] * own.rank
            shape[0], shape[own.axis] = "gates", len(own.gate)
            gate = oir.Value(name=gate_input(own.name), shape=oir.Shape(shape), type=value.type)
            gated.graph.inputs.append(gate)
            product = oir.Node("", "Mul", [value, gate], name=f"{gate.name}/Mul")
            product.outputs[0].name = f"{gate.name}/product"
            product.outputs[0].type, product.outputs[0].shape = value.type, value.shape
            gated.graph.insert_before(readers[0], product)
            for reader in readers:
                reader.replace_input_with(0, product.outputs[0])
        return oir.passes.PassResult(gated, modified=bool(self.places.values))
