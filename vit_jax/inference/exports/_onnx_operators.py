"""The primitives of JAX in operators of ONNX; see `_onnx_graph`.

An entry of `OPERATORS` takes (graph, equation, inputs) and returns the name of the result, the
names of several results, or a `Value` with axes that stay spread.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vit_jax.errors import UserError
from vit_jax.inference.exports._onnx_graph import Graph, Value, dtype_number, is_empty

Operator = Callable[[Graph, Any, list[Value]], str | list[str] | Value]

_FIRST = np.iinfo(np.int64).min


def _elementwise(build: Callable[..., str]) -> Operator:
    """Returns an operator whose result stays spread where all inputs are."""

    def operator(graph: Graph, equation: Any, inputs: list[Value]) -> Value:
        aval = equation.outvars[0].aval
        arrays = [one for one in inputs if one.shape]  # Numbers go with any shape.
        spread = frozenset.intersection(*[one.spread for one in arrays]) if arrays else frozenset()
        name = build(graph, equation, *map(graph.compact, inputs))
        return Value(name, aval.shape, aval.dtype, spread)

    return operator


def _direct(kind: str) -> Operator:
    return _elementwise(lambda graph, _, *names: graph.op(kind, *names))


def _same(_graph: Graph, _equation: Any, inputs: list[Value]) -> Value:
    return inputs[0]


def _scalar(graph: Graph, equation: Any, number: float) -> str:
    return graph.array(number, equation.invars[0].aval.dtype)


def _and(graph: Graph, equation: Any, a: str, b: str) -> str:
    is_bool = equation.outvars[0].aval.dtype == bool
    return graph.op("And" if is_bool else "BitwiseAnd", a, b)


def _or(graph: Graph, equation: Any, a: str, b: str) -> str:
    is_bool = equation.outvars[0].aval.dtype == bool
    return graph.op("Or" if is_bool else "BitwiseOr", a, b)


def _not(graph: Graph, equation: Any, a: str) -> str:
    is_bool = equation.outvars[0].aval.dtype == bool
    return graph.op("Not" if is_bool else "BitwiseNot", a)


def _integer_power(graph: Graph, equation: Any, a: str) -> str:
    exponent = equation.params["y"]
    return (
        graph.op("Mul", a, a)
        if exponent == 2
        else graph.op("Pow", a, _scalar(graph, equation, exponent))
    )


def _log1p(graph: Graph, equation: Any, a: str) -> str:
    """log(1 + a), which loses no digits of a small `a`: the rounding of 1 + a cancels.

    log(u) a / (u - 1) for u = 1 + a (Goldberg 1991, "What every computer scientist should know
    about floating-point arithmetic", theorem 4).
    """
    one = _scalar(graph, equation, 1)
    u = graph.op("Add", a, one)
    scaled = graph.op("Mul", graph.op("Log", u), graph.op("Div", a, graph.op("Sub", u, one)))
    return graph.op("Where", graph.op("Equal", u, one), a, scaled)


def _cast(graph: Graph, equation: Any, a: str) -> str:
    return graph.op("Cast", a, to=dtype_number(equation.params["new_dtype"]))


def _selected(graph: Graph, equation: Any, *names: str) -> str:
    which, *cases = names
    if len(cases) != 2 or equation.invars[0].aval.dtype != bool:
        raise UserError("to=onnx: a choice among more than two arrays is not expressed")
    return graph.op("Where", which, cases[1], cases[0])


def _clamped(graph: Graph, _: Any, low: str, a: str, high: str) -> str:
    return graph.op("Max", low, graph.op("Min", a, high))


def _broadcast(graph: Graph, equation: Any, inputs: list[Value]) -> Value:
    (value, *_), aval = inputs, equation.outvars[0].aval
    kept = equation.params["broadcast_dimensions"]
    name, new = graph.compact(value), sorted({*range(len(aval.shape))} - {*kept})
    if new:
        name = graph.op("Unsqueeze", name, graph.integers(*new))
    ones = [axis for i, axis in enumerate(kept) if i in value.spread or _is_one(value.shape[i])]
    spread = frozenset(axis for axis in [*new, *ones] if not _is_one(aval.shape[axis]))
    return Value(name, aval.shape, aval.dtype, spread)


def _is_one(side: Any) -> bool:
    return isinstance(side, int | np.integer) and side == 1


def _transposed(graph: Graph, equation: Any, inputs: list[Value]) -> Value:
    (value,), order = inputs, equation.params["permutation"]
    aval = equation.outvars[0].aval
    spread = frozenset(new for new, old in enumerate(order) if old in value.spread)
    return Value(graph.transposed(graph.compact(value), order), aval.shape, aval.dtype, spread)


def _reshaped(graph: Graph, equation: Any, inputs: list[Value]) -> str:
    value = inputs[0]
    return graph.reshaped(graph.whole(value), value.shape, equation.outvars[0].aval.shape)


def _concatenated(graph: Graph, equation: Any, inputs: list[Value]) -> str:
    parts = [graph.whole(one) for one in inputs if not is_empty(one)]
    return graph.op("Concat", *parts, axis=int(equation.params["dimension"]))


def _stacked(graph: Graph, equation: Any, inputs: list[Value]) -> str:
    axis = int(equation.params["axis"])
    parts = [graph.op("Unsqueeze", graph.whole(one), graph.integers(axis)) for one in inputs]
    return graph.op("Concat", *parts, axis=axis)


def _split(graph: Graph, equation: Any, inputs: list[Value]) -> list[str]:
    sizes = [int(size) for size in equation.params["sizes"]]
    name, axis = graph.whole(inputs[0]), int(equation.params["axis"])
    return graph.ops("Split", len(sizes), name, graph.integers(*sizes), axis=axis)


def _sliced(graph: Graph, equation: Any, inputs: list[Value]) -> str:
    p = equation.params
    shape = inputs[0].shape
    steps = p["strides"] or (1,) * len(shape)
    cuts = zip(p["start_indices"], p["limit_indices"], steps, strict=True)
    return _cut(graph, graph.whole(inputs[0]), shape, list(cuts))


def _cut(graph: Graph, name: str, shape: Sequence[Any], cuts: Sequence[Sequence[Any]]) -> str:
    """Slices an array by (start, limit, step) for each axis; whole axes are left alone."""
    partial = [
        (axis, start, limit, step)
        for axis, (start, limit, step) in enumerate(cuts)
        if str(limit) != str(shape[axis]) or start != 0 or step != 1
    ]
    if not partial:
        return name
    axes, starts, limits, steps = map(graph.shape, zip(*partial, strict=True))
    return graph.op("Slice", name, starts, limits, axes, steps)


def _reversed(graph: Graph, equation: Any, inputs: list[Value]) -> str:
    axes = equation.params["dimensions"]
    count = len(axes)
    vectors = ([-1] * count, [_FIRST] * count, axes, [-1] * count)
    return graph.op("Slice", graph.whole(inputs[0]), *[graph.integers(*one) for one in vectors])


def _dynamic_slice(graph: Graph, equation: Any, inputs: list[Value]) -> str:
    value, *starts = inputs
    if any(start.constant is None for start in starts):
        raise UserError("to=onnx: a slice at a computed place is not expressed")
    cuts = [
        (int(start.constant), int(start.constant) + size, 1)
        if isinstance(size, int)
        else (0, size, 1)
        for start, size in zip(starts, equation.params["slice_sizes"], strict=True)
        if start.constant is not None
    ]
    return _cut(graph, graph.whole(value), value.shape, cuts)


def _padded(graph: Graph, equation: Any, inputs: list[Value]) -> str:
    low, high, inside = zip(*equation.params["padding_config"], strict=True)
    if any(inside):
        raise UserError("to=onnx: padding between elements is not expressed")
    if not any(low) and not any(high):
        return graph.whole(inputs[0])
    pads = graph.integers(*map(int, [*low, *high]))
    return graph.op("Pad", graph.whole(inputs[0]), pads, graph.compact(inputs[1]))


def _iota(graph: Graph, equation: Any, _: list[Value]) -> Value:
    aval, axis = equation.outvars[0].aval, equation.params["dimension"]
    sides = [1] * len(aval.shape)
    sides[axis] = aval.shape[axis]
    if not isinstance(sides[axis], int):
        raise UserError(
            "to=onnx: a count over the rows is not expressed; fix the number of rows with batch=N"
        )
    name = graph.array(np.arange(sides[axis], dtype=aval.dtype).reshape(sides))
    others = [i for i, side in enumerate(aval.shape) if i != axis and not _is_one(side)]
    return Value(name, aval.shape, aval.dtype, frozenset(others))


def _reduced(kind: str) -> Operator:
    def operator(graph: Graph, equation: Any, inputs: list[Value]) -> str:
        axes = graph.integers(*equation.params["axes"])
        name = graph.whole(inputs[0])
        if inputs[0].dtype == bool:  # All and any of bools.
            name = graph.op("Cast", name, to=dtype_number(np.int32))
            name = graph.op(kind, name, axes, keepdims=0)
            return graph.op("Cast", name, to=dtype_number(bool))
        return graph.op(kind, name, axes, keepdims=0)

    return operator


def _arg(kind: str) -> Operator:
    def operator(graph: Graph, equation: Any, inputs: list[Value]) -> str:
        (axis,) = equation.params["axes"]
        name = graph.op(kind, graph.whole(inputs[0]), axis=int(axis), keepdims=0)
        return graph.op("Cast", name, to=dtype_number(equation.params["index_dtype"]))

    return operator


def _top_k(graph: Graph, equation: Any, inputs: list[Value]) -> list[str]:
    axis = equation.params.get("axis", len(inputs[0].shape) - 1)
    count = graph.integers(equation.params["k"])
    values, places = graph.ops("TopK", 2, graph.whole(inputs[0]), count, axis=int(axis))
    return [values, graph.op("Cast", places, to=dtype_number(np.int32))]


def _cumulative_sum(graph: Graph, equation: Any, inputs: list[Value]) -> str:
    axis = graph.array(equation.params["axis"], np.int64)
    backward = int(equation.params["reverse"])
    return graph.op("CumSum", graph.whole(inputs[0]), axis, reverse=backward)


def _matrix_product(graph: Graph, equation: Any, inputs: list[Value]) -> str:
    """A product of matrices over the axes that are kept apart (batch) and those summed over."""
    (left_sum, right_sum), (left_batch, right_batch) = equation.params["dimension_numbers"]
    left, right = inputs
    left_free = _others(left, left_sum, left_batch)
    right_free = _others(right, right_sum, right_batch)
    rows = [left.shape[axis] for axis in left_free]
    columns = [right.shape[axis] for axis in right_free]
    batch = [left.shape[axis] for axis in left_batch]
    summed = math.prod(left.shape[axis] for axis in left_sum)
    # Without a batch, the rows of the left side may have any number of axes.
    tall = rows if not batch and rows else [*batch, math.prod(rows)]
    a = graph.transposed(graph.whole(left), [*left_batch, *left_free, *left_sum])
    sides = [left.shape[axis] for axis in (*left_batch, *left_free, *left_sum)]
    a = graph.reshaped(a, sides, [*tall, summed])
    b = graph.transposed(graph.whole(right), [*right_batch, *right_sum, *right_free])
    sides = [right.shape[axis] for axis in (*right_batch, *right_sum, *right_free)]
    b = graph.reshaped(b, sides, [*batch, summed, math.prod(columns)])
    product = graph.op("MatMul", a, b)
    wanted = equation.outvars[0].aval.shape
    return graph.reshaped(product, [*tall, math.prod(columns)], wanted)


def _others(value: Value, *taken: Sequence[int]) -> list[int]:
    return [axis for axis in range(len(value.shape)) if all(axis not in one for one in taken)]


def _convolved(graph: Graph, equation: Any, inputs: list[Value]) -> str:
    p = equation.params
    image, kernel, out = p["dimension_numbers"]
    if any(side != 1 for side in p["lhs_dilation"]) or p["batch_group_count"] != 1:
        raise UserError("to=onnx: a transposed convolution is not expressed")
    low, high = zip(*p["padding"], strict=True)
    name = graph.op(
        "Conv",
        graph.transposed(graph.whole(inputs[0]), image),
        graph.transposed(graph.whole(inputs[1]), kernel),
        strides=[int(x) for x in p["window_strides"]],
        dilations=[int(x) for x in p["rhs_dilation"]],
        pads=[int(x) for x in (*low, *high)],
        group=int(p["feature_group_count"]),
    )
    return graph.transposed(name, np.argsort(out).tolist())


def _max_pooled(graph: Graph, equation: Any, inputs: list[Value]) -> str:
    """The maximum over windows of images `[n, h, w, c]`."""
    p = equation.params
    window, steps, padding = p["window_dimensions"], p["window_strides"], p["padding"]
    dilated = [*p["base_dilation"], *p["window_dilation"]]
    is_image = len(window) == 4 and window[0] == window[3] == steps[0] == steps[3] == 1
    if not is_image or any(side != 1 for side in dilated) or any([*padding[0], *padding[3]]):
        raise UserError("to=onnx: a maximum over such windows is not expressed")
    (top, bottom), (left, right) = padding[1:3]
    name = graph.op(
        "MaxPool",
        graph.transposed(graph.whole(inputs[0]), (0, 3, 1, 2)),
        kernel_shape=[int(x) for x in window[1:3]],
        strides=[int(x) for x in steps[1:3]],
        pads=[int(x) for x in (top, left, bottom, right)],
    )
    return graph.transposed(name, (0, 2, 3, 1))


def _gathered(graph: Graph, equation: Any, inputs: list[Value]) -> str:
    """Rows by number, or a slice at a known place; JAX keeps numbers within the array."""
    (value, places), p = inputs, equation.params
    numbers, sizes = p["dimension_numbers"], p["slice_sizes"]
    collapsed, started = numbers.collapsed_slice_dims, numbers.start_index_map
    batched = numbers.operand_batching_dims
    if places.constant is not None and places.constant.ndim == 1 and not batched:
        return _gathered_slice(graph, equation, value, places.constant)
    name, index = graph.whole(value), graph.whole(places)
    whole = [str(size) == str(side) for size, side in zip(sizes, value.shape, strict=True)]
    rest = [axis for axis in range(len(value.shape)) if axis not in (*batched, *collapsed)]
    count, offset = len(places.shape) - 1, numbers.offset_dims
    is_whole = all(whole[axis] for axis in rest) and tuple(started) == tuple(collapsed)
    if is_whole and not batched and len(collapsed) == 1:
        (axis,) = collapsed
        taken = range(axis, axis + count)
        if list(offset) == [i for i in range(count + len(rest)) if i not in taken]:
            index = graph.reshaped(index, places.shape, places.shape[:-1])
            return graph.op("Gather", name, index, axis=int(axis))
    leading = (*batched, *collapsed) == tuple(range(len(batched) + len(collapsed)))
    if not is_whole or not leading or list(offset) != [*range(count, count + len(rest))]:
        raise UserError("to=onnx: such a lookup by computed numbers is not expressed")
    index = graph.op("Cast", index, to=dtype_number(np.int64))
    return graph.op("GatherND", name, index, batch_dims=len(batched))


def _gathered_slice(graph: Graph, equation: Any, value: Value, places: np.ndarray) -> str:
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    starts = dict(zip(numbers.start_index_map, map(int, places), strict=True))
    cuts = [
        (starts.get(axis, 0), size if axis not in starts else starts[axis] + size, 1)
        for axis, size in enumerate(sizes)
    ]
    name = _cut(graph, graph.whole(value), value.shape, cuts)
    left = [size for axis, size in enumerate(sizes) if axis not in numbers.collapsed_slice_dims]
    return graph.reshaped(name, sizes, left)


OPERATORS: dict[str, Operator] = {
    **{
        name: _direct(kind)
        for name, kind in {
            "abs": "Abs", "add": "Add", "ceil": "Ceil", "cos": "Cos", "div": "Div", "eq": "Equal",
            "erf": "Erf", "exp": "Exp", "floor": "Floor", "ge": "GreaterOrEqual", "gt": "Greater",
            "le": "LessOrEqual", "log": "Log", "logistic": "Sigmoid", "lt": "Less", "max": "Max",
            "min": "Min", "mul": "Mul", "neg": "Neg", "pow": "Pow", "sign": "Sign", "sin": "Sin",
            "sqrt": "Sqrt", "sub": "Sub", "tanh": "Tanh",
        }.items()
    },
    "and": _elementwise(_and),
    "or": _elementwise(_or),
    "not": _elementwise(_not),
    "clamp": _elementwise(_clamped),
    "convert_element_type": _elementwise(_cast),
    "erfc": _elementwise(
        lambda graph, equation, a: graph.op("Sub", _scalar(graph, equation, 1), graph.op("Erf", a))
    ),
    "integer_pow": _elementwise(_integer_power),
    "log1p": _elementwise(_log1p),
    "ne": _elementwise(lambda graph, _, a, b: graph.op("Not", graph.op("Equal", a, b))),
    "rem": _elementwise(lambda graph, _, a, b: graph.op("Mod", a, b, fmod=1)),
    "round": _direct("Round"),
    "rsqrt": _elementwise(lambda graph, _, a: graph.op("Reciprocal", graph.op("Sqrt", a))),
    "select_n": _elementwise(_selected),
    "square": _elementwise(lambda graph, _, a: graph.op("Mul", a, a)),
    "argmax": _arg("ArgMax"),
    "argmin": _arg("ArgMin"),
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenated,
    "conv_general_dilated": _convolved,
    "copy": _same,
    "copy_p": _same,
    "cumsum": _cumulative_sum,
    "dot_general": _matrix_product,
    "dynamic_slice": _dynamic_slice,
    "gather": _gathered,
    "iota": _iota,
    "optimization_barrier": _same,
    "pad": _padded,
    "reduce_and": _reduced("ReduceMin"),
    "reduce_max": _reduced("ReduceMax"),
    "reduce_min": _reduced("ReduceMin"),
    "reduce_or": _reduced("ReduceMax"),
    "reduce_sum": _reduced("ReduceSum"),
    "reduce_window_max": _max_pooled,
    "reshape": _reshaped,
    "rev": _reversed,
    "sharding_constraint": _same,
    "slice": _sliced,
    "split": _split,
    "squeeze": _reshaped,
    "stack": _stacked,
    "stop_gradient": _same,
    "top_k": _top_k,
    "transpose": _transposed,
}  # fmt: skip
"""Primitives of JAX by name."""
