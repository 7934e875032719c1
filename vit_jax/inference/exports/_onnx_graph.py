"""Translates a traced JAX function (a jaxpr) into a graph of ONNX.

ONNX has no counterpart of `jax.export`: no operator calls StableHLO. The programs that are exported
consist of some fifty primitives of JAX, and each of them is one or a few operators of ONNX, as
`_onnx_operators` lists them. Loops over layers are written out, since their lengths are known. What
depends on constants alone is computed here, but for what depends on weights, so that weights are
stored as they are, for example as int8.

A broadcast array is kept as it was before, because the elementwise operators of ONNX broadcast by
themselves. `Value.spread` tells the axes.

The operators: https://onnx.ai/onnx/operators/
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from jax.extend import core

from vit_jax.errors import UserError

OPSET = 18
"""The version of the operators, of December 2022; ReduceMax takes axes as an input since then."""

_IR_VERSION = 9
_LINEAR = re.compile(r"((?P<times>\d+)\*)?batch(?P<plus> [+-] \d+)?")  # As JAX prints a symbol.
_MOST_FOLDED = 1 << 16  # Numbers; a larger constant is computed when the graph is loaded.

_ELEMENTWISE = ("Cast", "Mul")
"""Operators that unpack weights. On stacked weights, they are applied to each layer apart."""

_INLINED = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "checkpoint": "jaxpr",
}
"""Primitives that stand for another jaxpr, and the parameter that holds it."""


@dataclasses.dataclass(frozen=True)
class Value:
    """An array of the traced function.

    Attributes:
      name: its name in the graph; "" for a constant that no operator has used yet.
      shape: its shape in JAX. A dimension may be a symbol.
      dtype: its dtype.
      spread: the axes that have the size 1 in the graph, in place of the size in `shape`.
      constant: its content, if that is known and no weight.
    """

    name: str
    shape: tuple[Any, ...]
    dtype: np.dtype
    spread: frozenset[int] = frozenset()
    constant: np.ndarray | None = None


class Graph:
    """The nodes and constants of a graph that is being made."""

    def __init__(self, input_name: str, operators: Mapping[str, Any]) -> None:
        self.operators = operators
        self.nodes: list[Any] = []
        self.arrays: dict[str, np.ndarray] = {}
        self.input_name = input_name
        self._made_by: dict[str, Any] = {}
        self._rows: dict[tuple[str, int], str] = {}
        self._numbers = itertools.count()

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Adds an operator with one output, and returns the name of the output."""
        return self.ops(kind, 1, *inputs, **attributes)[0]

    def ops(self, kind: str, count: int, *inputs: str, **attributes: Any) -> list[str]:
        """Adds an operator with `count` outputs, and returns their names."""
        outputs = [f"{kind.lower()}_{next(self._numbers)}" for _ in range(count)]
        node = onnx.helper.make_node(kind, list(inputs), outputs, **attributes)
        self.nodes.append(node)
        self._made_by.update(dict.fromkeys(outputs, node))
        return outputs

    def array(self, content: Any, dtype: Any = None) -> str:
        """Adds a constant, and returns its name."""
        name = f"constant_{next(self._numbers)}"
        self.arrays[name] = np.asarray(content, dtype)
        return name

    def integers(self, *numbers: int | np.integer) -> str:
        """Adds a vector of int64, as operators take shapes and axes."""
        return self.array(numbers, np.int64)

    def whole(self, value: Value) -> str:
        """Returns the name of an array that has its full shape in the graph."""
        name = self.compact(value)
        if not value.spread:
            return name
        sides = [side if i in value.spread else 1 for i, side in enumerate(value.shape)]
        return self.op("Expand", name, self.shape(sides))

    def compact(self, value: Value) -> str:
        """Returns the name of an array that has the size 1 in the axes of `spread`."""
        return value.name or self.array(value.constant)

    def shape(self, sides: Sequence[Any]) -> str:
        """Returns the name of a vector of int64 with the sizes of `sides`, which may be symbols."""
        if all(isinstance(side, int | np.integer) for side in sides):
            return self.integers(*sides)
        parts = [
            self.integers(side) if isinstance(side, int | np.integer) else self._of_rows(side)
            for side in sides
        ]
        return self.op("Concat", *parts, axis=0)

    def _of_rows(self, side: Any) -> str:
        """Returns the name of a vector with a size that depends on the number of rows."""
        found = _LINEAR.fullmatch(str(side))
        if not found:
            raise UserError(
                f"to=onnx: an array of {side} rows is not expressed; fix the"
                " number of rows with batch=N"
            )
        size = self.op("Shape", self.input_name, start=0, end=1)
        if found["times"]:
            size = self.op("Mul", size, self.integers(int(found["times"])))
        if found["plus"]:
            size = self.op("Add", size, self.integers(int(found["plus"].replace(" ", ""))))
        return size

    def reshaped(self, name: str, old: Sequence[Any], new: Sequence[Any]) -> str:
        """Returns the name of an array in another shape."""
        if list(map(str, old)) == list(map(str, new)):
            return name
        symbols = [i for i, side in enumerate(new) if not isinstance(side, int | np.integer)]
        if len(symbols) > 1:
            return self.op("Reshape", name, self.shape(new))
        sides = [-1 if i in symbols else side for i, side in enumerate(new)]
        return self.op("Reshape", name, self.integers(*sides))

    def transposed(self, name: str, order: Sequence[int]) -> str:
        """Returns the name of an array with its axes in another order."""
        if list(order) == sorted(order):
            return name
        return self.op("Transpose", name, perm=[int(axis) for axis in order])

    def row(self, name: str, index: int) -> str:
        """Returns the name of `array[index]`; weights are cut here, and unpacked afterwards."""
        if (name, index) not in self._rows:
            self._rows[name, index] = self._row(name, index)
        return self._rows[name, index]

    def _row(self, name: str, index: int) -> str:
        if name in self.arrays:
            content = self.arrays[name]
            cut = f"{name}/{index}"
            self.arrays[cut] = content[index] if content.ndim else content
            return cut
        node = self._made_by.get(name)
        if node is not None and node.op_type in _ELEMENTWISE and self._is_of_arrays(node):
            given = [self.row(one, index) for one in node.input]
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            return self.op(node.op_type, *given, **attributes)
        return self.op("Gather", name, self.array(index, np.int64), axis=0)

    def _is_of_arrays(self, node: Any) -> bool:
        behind = [one for one in node.input if one not in self.arrays]
        nodes = [self._made_by.get(one) for one in behind]
        return all(
            n is not None and n.op_type in _ELEMENTWISE and self._is_of_arrays(n) for n in nodes
        )


def is_empty(array: Any) -> bool:
    """Returns whether an array, a `Value` or a shape of JAX, has no elements for any batch."""
    return any(isinstance(side, int | np.integer) and side == 0 for side in array.shape)


def dtype_number(dtype: Any) -> int:
    """Returns the number that ONNX has for a dtype."""
    return onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))


def translate(
    closed: core.ClosedJaxpr,
    weights: Mapping[str, np.ndarray],
    input_name: str,
    outputs: Sequence[str],
    operators: Mapping[str, Any],
) -> Any:
    """Returns a model of ONNX.

    Args:
      closed: the traced function of (weights in the order of their names, one batch of inputs).
      weights: the weights by name.
      input_name, outputs: the names of the input and of the outputs.
      operators: by the name of a primitive of JAX, a function of (graph, equation, inputs) that
        adds its operators and returns a name, several names or a `Value`.

    Raises:
      UserError: the function has an operation that ONNX, or this module, has no counterpart for.
    """
    graph = Graph(input_name, operators)
    graph.arrays.update(weights)
    shapes: list[Any] = [variable.aval for variable in closed.jaxpr.invars]
    names = [*sorted(weights), input_name]
    given = [Value(n, a.shape, a.dtype) for n, a in zip(names, shapes, strict=True)]
    constants = [_known(np.asarray(constant)) for constant in closed.consts]
    found = run(graph, closed.jaxpr, constants, given)
    for name, value in zip(outputs, found, strict=True):
        graph.nodes.append(onnx.helper.make_node("Identity", [graph.whole(value)], [name]))
    return _assembled(graph, given[-1], list(zip(outputs, found, strict=True)))


def run(
    graph: Graph, jaxpr: core.Jaxpr, constants: Sequence[Value], arguments: Sequence[Value]
) -> list[Value]:
    """Adds what computes a jaxpr to the graph, and returns its results."""
    variables = [*jaxpr.constvars, *jaxpr.invars]
    known = dict(zip(variables, [*constants, *arguments], strict=True))

    def read(atom: Any) -> Value:
        if isinstance(atom, core.Literal):
            shape: Any = atom.aval
            return _known(np.asarray(atom.val, shape.dtype))
        return known[atom]

    for equation in jaxpr.eqns:
        found = _results(graph, equation, [read(atom) for atom in equation.invars])
        known.update(zip(equation.outvars, found, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _known(content: np.ndarray) -> Value:
    return Value("", content.shape, content.dtype, constant=content)


def _results(graph: Graph, equation: Any, inputs: Sequence[Value]) -> list[Value]:
    name, shapes = equation.primitive.name, [out.aval for out in equation.outvars]
    if all(is_empty(shape) for shape in shapes):  # A border of no pixels; see `concatenate`.
        return [Value("", shape.shape, shape.dtype) for shape in shapes]
    if name in _INLINED:
        inner = equation.params[_INLINED[name]]
        jaxpr, constants = getattr(inner, "jaxpr", inner), getattr(inner, "consts", ())
        return run(graph, jaxpr, [_known(np.asarray(one)) for one in constants], inputs)
    if name == "scan":
        return _scan(graph, equation, inputs)
    if _is_folded(inputs, shapes):
        done = equation.primitive.bind(*[one.constant for one in inputs], **equation.params)
        return [_known(np.asarray(x)) for x in (done if len(shapes) > 1 else [done])]
    operator = graph.operators.get(name)
    if operator is None:
        raise UserError(
            f"to=onnx: the model's operation {name!r} has no counterpart there; export it to"
            " stablehlo or savedmodel"
        )
    found = operator(graph, equation, list(inputs))
    if isinstance(found, Value):
        return [found]
    names = [found] if isinstance(found, str) else found
    return [Value(n, a.shape, a.dtype) for n, a in zip(names, shapes, strict=True)]


def _is_folded(inputs: Sequence[Value], shapes: Sequence[Any]) -> bool:
    """Returns whether an operation is computed here, because it is small and of constants."""
    sides = [side for shape in shapes for side in shape.shape]
    if any(one.constant is None for one in inputs) or not all(isinstance(s, int) for s in sides):
        return False
    most = max([_MOST_FOLDED, *(one.constant.size for one in inputs if one.constant is not None)])
    return all(math.prod(shape.shape) <= most for shape in shapes)


def _scan(graph: Graph, equation: Any, inputs: Sequence[Value]) -> list[Value]:
    """Writes a loop out: its body once for every index."""
    p = equation.params
    inner, length = p["jaxpr"], p["length"]
    fixed = inputs[: p["num_consts"]]
    carried = list(inputs[p["num_consts"] : p["num_consts"] + p["num_carry"]])
    stacked = inputs[p["num_consts"] + p["num_carry"] :]
    constants = [_known(np.asarray(one)) for one in inner.consts]
    order = range(length)[:: -1 if p["reverse"] else 1]
    rows: dict[int, list[Value]] = {}
    for index in order:
        cut = [_row_of(graph, one, index) for one in stacked]
        found = run(graph, inner.jaxpr, constants, [*fixed, *carried, *cut])
        carried, rows[index] = found[: p["num_carry"]], found[p["num_carry"] :]
    results = carried
    for number, out in enumerate(equation.outvars[p["num_carry"] :]):
        parts = [graph.whole(rows[index][number]) for index in range(length)]
        parts = [graph.op("Unsqueeze", part, graph.integers(0)) for part in parts]
        name = graph.op("Concat", *parts, axis=0)
        results.append(Value(name, out.aval.shape, out.aval.dtype))
    return results


def _row_of(graph: Graph, value: Value, index: int) -> Value:
    shape = value.shape[1:]
    if value.constant is not None:
        return _known(value.constant[index])
    spread = frozenset(axis - 1 for axis in value.spread if axis)
    where = 0 if 0 in value.spread else index
    return Value(graph.row(graph.compact(value), where), shape, value.dtype, spread)


def _assembled(graph: Graph, given: Value, found: Sequence[tuple[str, Value]]) -> Any:
    """Returns the model with the nodes and arrays that its outputs depend on."""
    needed, nodes = {name for name, _ in found}, []
    for node in reversed(graph.nodes):
        if needed.intersection(node.output):
            needed.update(node.input)
            nodes.append(node)
    arrays = [
        onnx.numpy_helper.from_array(np.ascontiguousarray(content).reshape(content.shape), name)
        for name, content in graph.arrays.items()
        if name in needed
    ]
    told = [(graph.input_name, given), *found]
    sides = [_described(name, value) for name, value in told]
    made = onnx.helper.make_graph(nodes[::-1], "vit_jax", sides[:1], sides[1:], arrays)
    return onnx.helper.make_model(
        made,
        opset_imports=[onnx.helper.make_opsetid("", OPSET)],
        ir_version=_IR_VERSION,
        producer_name="vit_jax",
    )


def _described(name: str, value: Value) -> Any:
    sides = [side if isinstance(side, int) else str(side) for side in value.shape]
    return onnx.helper.make_tensor_value_info(name, dtype_number(value.dtype), sides)
