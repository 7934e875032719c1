"""Computes from HLO text the bytes that a compiled program sends and stores.

XLA's own cost analysis counts the body of a loop once. Here every instruction counts as often as
the loops around it run. The trip count is the bound in the loop's condition, or 1 if the bound is
not a constant.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
SCATTERED = "all-reduce-scatter"
"""A sum of which each device keeps one part; its instruction is an all-reduce of whole arrays."""

_BITS = {"pred": 8, "s4": 4, "u4": 4, "token": 0}
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "partition-id", "replica-id", "iota", "opt-barrier",
}  # fmt: skip

# `call-start` hands a computation to a TPU's SparseCore.
_CALLS = {"call", "conditional", "async-start", "call-start"}
_COMPUTING = {"fusion", "dot", "convolution", "while", "call", "conditional", "custom-call"}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"\s([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_NAMED = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation; `shape` and `rest` (operands, attributes) are its text."""

    name: str
    shape: str
    opcode: str
    rest: str
    is_root: bool

    def called(self, attribute: str) -> str:
        """Returns the computation that `attribute=%NAME` names, or ""."""
        match = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.rest)
        return match[1] if match else ""

    def operands(self) -> list[str]:
        """Returns the names of the operands, followed by computations that attributes may name."""
        return _NAMED.findall(self.rest)

    def constant(self) -> int | None:
        """Returns the value of an integer constant, or None for other instructions."""
        match = re.match(r"\s*constant\((\d+)\)", self.rest)
        return int(match[1]) if match else None


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation of the program.

    Attributes:
      kind: one of `COLLECTIVES`, or `SCATTERED`.
      bytes: the size of the largest array that it reads or produces on a device.
      sent: the bytes that a device sends each time, by the best known algorithm on a ring.
      times: the number of times that a step runs it.
      group_size: the number of devices in one of its groups.
      op_name: the operation of the model that it comes from.
      is_overlapped: whether the device computes at the same time.
    """

    kind: str
    bytes: int
    sent: float
    times: int
    group_size: int
    op_name: str
    is_overlapped: bool

    @property
    def total_sent(self) -> float:
        return self.sent * self.times


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The kernels that a device runs in a step, with loops multiplied out.

    Attributes:
      fusions: the number of fusions of operations.
      copies: the number of copies of arrays to another place or layout in the main memory.
    """

    fusions: int
    copies: int
    copied_bytes: int


class Program:
    """A compiled program, given by the text that `jax.stages.Compiled.as_text` returns."""

    def __init__(self, text: str):
        self._computations: dict[str, list[Instruction]] = {}
        self._entry = ""
        current: list[Instruction] = []
        for line in text.splitlines():
            started = _COMPUTATION.match(line)
            if started:
                current = self._computations.setdefault(started[2], [])
                self._entry = started[2] if started[1] else self._entry
                continue
            match = _INSTRUCTION.match(line)
            if match:
                opcode = _OPCODE.search(" " + match[3])
                if opcode:
                    at = opcode.start()
                    shape, rest = match[3][:at], match[3][at:]
                    current.append(Instruction(match[2], shape, opcode[1], rest, bool(match[1])))
        header = re.search(r"num_partitions=(\d+)", text)
        self._num_devices = int(header[1]) if header else 1

    def collectives(self) -> list[Collective]:
        """Returns every collective operation; one that TPUs run in several steps counts once."""
        # TPUs run these fusions as a reduce-scatter, so each device keeps one part of the sum.
        scattered = {
            instruction.name
            for name, computation in self._computations.items()
            if name.startswith("all-reduce-scatter")
            for instruction in computation
            if instruction.opcode == "all-reduce"
        }
        overlapped = self._overlapped()
        found: dict[tuple, Collective] = {}
        for times, instruction in self._run(self._entry, 1):
            kind = instruction.opcode.removesuffix("-start")
            if instruction.name in scattered:
                kind = SCATTERED
            if kind in (*COLLECTIVES, SCATTERED):
                # If several fusions together run one collective, all of them name its channel, and
                # some of them may be in the loops of others.
                channel = _channel(instruction)
                key = (kind, channel)
                if key not in found or found[key].times > times:
                    found[key] = self._collective(kind, instruction, times, channel in overlapped)
        return list(found.values())

    def _overlapped(self) -> set[str]:
        """Returns the channels of the collectives that overlap with computation.

        Either the program starts them and ends them later, or TPUs run them inside a fusion.
        """
        found = set()
        for name, computation in self._computations.items():
            inside = name.startswith("async_collective_fusion")
            for at, instruction in enumerate(computation):
                if not (inside or _computes_until_done(computation[at:])):
                    continue
                found |= {
                    _channel(started)
                    for started in self._handed_on(instruction)
                    if started.opcode.removesuffix("-start") in COLLECTIVES
                }
        return found

    def _handed_on(self, instruction: Instruction) -> list[Instruction]:
        """Returns the instructions that a call runs, or the instruction if it is not a call."""
        if instruction.opcode not in _CALLS:
            return [instruction]
        called = self._branches(instruction)
        return [inner for name in called for inner in self._computations.get(name, ())]

    def kernels(self) -> Kernels:
        """Counts the kernels that a device runs in a step, without collectives."""
        run = [*self._run(self._entry, 1, into_fusions=False)]
        copies = [
            (times, sum(_main_memory(array) for array in _arrays(instruction.shape)))
            for times, instruction in run
            if instruction.opcode == "copy"
        ]
        return Kernels(
            fusions=sum(times for times, instruction in run if instruction.opcode == "fusion"),
            copies=sum(times for times, size in copies if size),
            copied_bytes=sum(times * size for times, size in copies),
        )

    def sent_between_slices(self, num_slices: int) -> float:
        """Returns the bytes that a device sends to other TPU slices, by ring algorithms.

        A program for several slices is compiled for one slice, and passes data for the others to
        the host's runtime.
        """
        total = 0.0
        for times, instruction in self._run(self._entry, 1):
            transfer = re.search(r'megascale_transfer_type="(\w+)"', instruction.rest)
            if instruction.opcode == "send" and transfer:
                size = max((_bytes(*a) for a in _arrays(instruction.shape)), default=0)
                rounds = 2 if transfer[1] == "ALL_REDUCE" else 1
                total += times * rounds * size * (num_slices - 1) / num_slices
        return total

    def stored_bytes(self) -> int:
        """Returns the bytes of all results that a step writes to the main memory.

        Views and the tuples of loops do not count. An in-place update counts as its slice.
        """
        return sum(
            times * self._stored(instruction)
            for times, instruction in self._run(self._entry, 1, into_fusions=False)
        )

    def _run(
        self, name: str, times: int, *, into_fusions: bool = True
    ) -> Iterator[tuple[int, Instruction]]:
        """Yields every instruction below a computation with the number of times that it runs."""
        for instruction in self._computations.get(name, ()):
            yield times, instruction
            if instruction.opcode == "while":
                trips = self._trip_count(instruction, name)
                body = instruction.called("body")
                yield from self._run(body, times * trips, into_fusions=into_fusions)
            elif instruction.opcode in _CALLS:
                for inner in self._branches(instruction):
                    yield from self._run(inner, times, into_fusions=into_fusions)
            elif instruction.opcode == "fusion" and into_fusions:
                yield from self._run(instruction.called("calls"), times)

    def _branches(self, instruction: Instruction) -> list[str]:
        branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.rest)
        if branches:
            return [name.strip().lstrip("%") for name in branches[1].split(",")]
        names = (instruction.called(a) for a in ("to_apply", "calls", "true_computation"))
        return [name for name in names if name]

    def _trip_count(self, loop: Instruction, caller: str) -> int:
        """Returns the number of iterations of a loop with constant start, end and increment.

        Returns 1 for other loops; in these programs those are only the loops of random draws.
        """
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
        if known:
            return int(known[1])
        condition, body = (self._by_name(loop.called(c)) for c in ("condition", "body"))
        root = next((i for i in condition.values() if i.is_root), None)
        if root is None or root.opcode != "compare" or "direction=LT" not in root.rest:
            return 1
        counter, bound = (condition.get(name) for name in root.operands()[:2])
        if counter is None or counter.opcode != "get-tuple-element" or bound is None:
            return 1
        named = re.search(r"index=(\d+)", counter.rest)
        assert named is not None, counter.rest
        index = int(named[1])
        start = _element(self._by_name(caller), loop.operands()[0], index)
        following = next(i.operands()[index] for i in body.values() if i.is_root)
        step, end = _increment(body, following), bound.constant()
        if end is None or not step:
            return 1
        return max(1, -(-(end - start) // step))

    def _by_name(self, computation: str) -> dict[str, Instruction]:
        return {i.name: i for i in self._computations.get(computation, ())}

    def _collective(
        self, kind: str, instruction: Instruction, times: int, is_overlapped: bool
    ) -> Collective:
        arrays = [_bytes(*array) for array in _arrays(instruction.shape)]
        n = self._group_size(instruction.rest)
        is_start = instruction.opcode.endswith("-start")
        if is_start and kind in ("all-gather", "collective-permute"):
            # The arrays are the operands, their results and perhaps a temporary buffer.
            count = len(arrays) // 2
            result = sum(arrays[count : 2 * count])
        else:
            result = sum(arrays)
        share = (n - 1) / n
        whole, sent = {
            "all-gather": (result, result * share),
            "all-reduce": (result, 2 * result * share),
            "reduce-scatter": (result * n, result * (n - 1)),
            SCATTERED: (result, result * share),
            "all-to-all": (result, result * share),
            "ragged-all-to-all": (result, result * share),
            "collective-permute": (result, result),
            "collective-broadcast": (result, result),
        }[kind]
        op_name = re.search(r'op_name="([^"]*)"', instruction.rest)
        name = op_name[1] if op_name else ""
        return Collective(kind, whole, sent, times, n, name, is_overlapped)

    def _group_size(self, rest: str) -> int:
        """Returns the number of devices in one group, from any of the forms that XLA writes."""
        listed = re.search(r"replica_groups=\{\{([\d,]+)\}", rest)
        if listed:
            return listed[1].count(",") + 1
        tiled = re.search(r"replica_groups=\[\d+,(\d+)\]<=", rest)
        if tiled:
            return int(tiled[1])
        named = re.search(r"replica_groups=\w*\[([^\]]*)\][^{]*\{([^}]*)\}", rest)
        if named:
            sizes = dict(re.findall(r"'([^']*)'=(\d+)", named[1]))
            # XLA writes a part of an axis as 'axis':(before)size.
            along = re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", named[2])
            return math.prod(int(part or sizes[name]) for name, part in along)
        return self._num_devices

    def _stored(self, instruction: Instruction) -> int:
        if instruction.opcode in _FREE or instruction.opcode.endswith(("-start", "-done")):
            return 0
        if instruction.opcode == "dynamic-update-slice" or "AllocateBuffer" in instruction.rest:
            return 0
        # Flags are included, so that sizes match the results of a fusion one to one.
        sizes = [_main_memory(array) for array in _ARRAY.findall(instruction.shape)]
        if instruction.opcode == "fusion":
            updates = self._slice_updates(instruction.called("calls"))
            if len(updates) == len(sizes):
                sizes = [
                    min(size, size if update is None else update)
                    for size, update in zip(sizes, updates, strict=True)
                ]
        return sum(sizes)

    def _slice_updates(self, computation: str) -> list[int | None]:
        """Returns for each result of a fusion the bytes that it replaces in place, or None."""
        inner = self._by_name(computation)
        root = next((i for i in inner.values() if i.is_root), None)
        if root is None:
            return []
        results = [root]
        if root.opcode == "tuple":
            results = [inner[name] for name in root.operands() if name in inner]
        return [_slice_update(inner, result) for result in results]


def _channel(collective: Instruction) -> str:
    """Returns a key that all instructions of one collective operation share."""
    channel = re.search(r"channel_id=(\d+)", collective.rest)
    return channel[1] if channel else collective.name


def _computes_until_done(begun: Sequence[Instruction]) -> bool:
    """Returns whether the device computes between the start of a collective and its end."""
    started, *following = begun
    if not started.opcode.endswith("-start"):
        return False
    meanwhile = itertools.takewhile(lambda i: started.name not in i.operands(), following)
    return any(instruction.opcode in _COMPUTING for instruction in meanwhile)


def _main_memory(array: tuple[str, str, str]) -> int:
    """Returns an array's bytes in main memory; 0 for on-chip memory, spaces `S(1)` and above."""
    return 0 if re.search(r"S\(\d", array[2]) else _bytes(*array)


def _slice_update(computation: Mapping[str, Instruction], result: Instruction) -> int | None:
    """Returns the bytes of the slice that a result replaces in an array; None if all is new."""
    while result.opcode in ("bitcast", "copy") and result.operands()[0] in computation:
        result = computation[result.operands()[0]]
    if result.opcode == "parameter":
        return 0  # A fusion that is part of a collective passes its buffers on.
    if result.opcode != "dynamic-update-slice" or result.operands()[1] not in computation:
        return None
    return sum(_bytes(*array) for array in _arrays(computation[result.operands()[1]].shape))


def _element(computation: Mapping[str, Instruction], name: str, index: int) -> int:
    """Returns the constant at `index` of a tuple; 0 where there is none, as counters start."""
    made = computation.get(name)
    if made is None or made.opcode != "tuple":
        return 0
    value = computation.get(made.operands()[index])
    while value is not None and value.opcode in ("copy", "bitcast"):
        value = computation.get(value.operands()[0])
    return (value.constant() or 0) if value is not None else 0


def _increment(body: Mapping[str, Instruction], name: str) -> int:
    """Returns what a loop's body adds to its counter, whose new value is `name`."""
    added = 0
    while (made := body.get(name)) is not None:
        if made.opcode in ("copy", "bitcast"):
            name = made.operands()[0]
        elif made.opcode == "add":
            left, right = (body.get(operand) for operand in made.operands()[:2])
            if right is None or right.constant() is None:
                left, right = right, left
            constant = right.constant() if right is not None else None
            if left is None or constant is None:
                return 0
            added, name = added + constant, left.name
        else:
            return added
    return added


def _arrays(shape: str) -> list[tuple[str, str, str]]:
    """Returns (type, dimensions, layout) of every array in the text of a shape, less flags."""
    return [a for a in _ARRAY.findall(shape) if a[0] == "token" or not _is_flag(a)]


def _is_flag(array: tuple[str, str, str]) -> bool:
    return not array[1] and array[0] in ("u32", "s32")


def _bytes(dtype: str, dimensions: str, _: str = "") -> int:
    bits = _BITS.get(dtype)
    if bits is None:
        digits = re.search(r"\d+", dtype)
        bits = int(digits[0]) if digits else 0
    return math.prod(int(n) for n in dimensions.split(",") if n) * bits // 8
