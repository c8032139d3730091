"""Run an OpenVINO graph in two parts: convolutions in the precision of the device, boxes in float32.

In bfloat16 a coordinate of 500 pixels is off by up to 1 pixel, and proposals are shifted before their features are
pooled. OpenVINO has no way to keep some operations of a graph in float32, so the graph is cut: the first part has the
convolutions of the backbone, the neck and the dense heads, the second all that follows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

_BOX_OPS = ("NonMaxSuppression", "TopK", "ROIAlign")  # they and what follows them have to do with boxes
_CONVOLUTIONS = ("Convolution", "GroupConvolution", "ConvolutionBackpropData")
_GIVEN = ("Parameter", "Constant")


@dataclass(frozen=True, kw_only=True, eq=False)
class GraphParts:
    """Two graphs that are run one after the other.

    Attributes:
        dense: computes what the other part needs of the image.
        boxes: from the inputs of the whole graph and the outputs of the first part, in their order, to its outputs.
        num_between: number of values that the first part passes on.
    """

    dense: Any
    boxes: Any
    num_between: int

    @classmethod
    def of(cls, model: Any) -> Self | None:
        """Cut an `openvino.Model`, which is not changed; None if it has no convolution before its boxes."""
        import openvino

        dense, boxes = model.clone(), model.clone()
        names = _dense_names(dense)
        ends = [
            (node.get_friendly_name(), output.get_index())
            for node in dense.get_ordered_ops()
            if node.get_friendly_name() in names and node.get_type_name() not in _GIVEN
            for output in node.outputs()
            if any(
                target.get_node().get_friendly_name() not in names for target in output.get_target_inputs()
            )
        ]
        if not ends:
            return None
        nodes = {node.get_friendly_name(): node for node in dense.get_ops()}
        first = openvino.Model([nodes[name].output(port) for name, port in ends], dense.get_parameters())
        nodes = {node.get_friendly_name(): node for node in boxes.get_ops()}
        between = []
        for name, port in ends:
            output = nodes[name].output(port)
            parameter = openvino.opset13.parameter(output.get_partial_shape(), output.get_element_type())
            for target in list(output.get_target_inputs()):
                if target.get_node().get_friendly_name() not in names:
                    target.replace_source_output(parameter.output(0))
            between.append(parameter)
        second = openvino.Model(boxes.get_results(), [*boxes.get_parameters(), *between])
        return cls(dense=first, boxes=second, num_between=len(between))

    def reshaped(self, shapes: Mapping[str, Sequence[int]]) -> Self:
        """Return the parts for inputs of fixed shapes, by the name of the input."""
        dense, boxes = self.dense.clone(), self.boxes.clone()
        dense.reshape(dict(shapes))
        given = boxes.inputs[: -self.num_between]
        between = boxes.inputs[-self.num_between :]
        boxes.reshape(
            {
                **{each: shapes.get(each.get_any_name(), each.get_partial_shape()) for each in given},
                **{
                    each: output.get_partial_shape()
                    for each, output in zip(between, dense.outputs, strict=True)
                },
            }
        )
        return type(self)(dense=dense, boxes=boxes, num_between=self.num_between)

    def compile(self, core: Any, device: str, options: Mapping[str, Any]) -> "CompiledParts":
        """Compile both parts, the second for float32."""
        exact = {**options, "INFERENCE_PRECISION_HINT": "f32"}
        return CompiledParts(
            dense=core.compile_model(self.dense, device, dict(options)),
            boxes=core.compile_model(self.boxes, device, exact),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class CompiledParts:
    """Two compiled graphs, called as one.

    Attributes:
        dense: the first part.
        boxes: the second part.
    """

    dense: Any
    boxes: Any

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> Any:
        """Return the outputs of the second part for inputs by name."""
        between = self.dense([inputs[each.get_any_name()] for each in self.dense.inputs], share_outputs=True)
        given = [inputs[each.get_any_name()] for each in self.boxes.inputs[: len(inputs)]]
        return self.boxes([*given, *between.to_tuple()], share_inputs=True)


def _dense_names(model: Any) -> set[str]:
    """Return the names of the operations of the first part: the convolutions before all boxes, and what they need."""
    nodes, follows_boxes = model.get_ordered_ops(), set[str]()
    for node in nodes:
        sources = {source.get_friendly_name() for source in _sources(node)}
        if node.get_type_name() in _BOX_OPS or sources & follows_boxes:
            follows_boxes.add(node.get_friendly_name())
    dense = set[str]()
    todo = [
        node
        for node in nodes
        if node.get_type_name() in _CONVOLUTIONS and node.get_friendly_name() not in follows_boxes
    ]
    while todo:
        node = todo.pop()
        if node.get_friendly_name() not in dense:
            dense.add(node.get_friendly_name())
            todo += _sources(node)
    for node in nodes:  # the bias of a convolution is an operation of its own
        types = {source.get_type_name() for source in _sources(node)}
        is_bias = node.get_type_name() == "Add" and types <= {"Constant", *_CONVOLUTIONS}
        if is_bias and any(source.get_friendly_name() in dense for source in _sources(node)):
            dense.add(node.get_friendly_name())
    return dense


def _sources(node: Any) -> list[Any]:
    return [value.get_source_output().get_node() for value in node.inputs()]
