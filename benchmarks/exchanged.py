"""The bytes that one device sends in a compiled program, read from its HLO."""

import math
import re

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4,
          "u32": 4, "f64": 8, "s64": 8, "u64": 8}  # fmt: skip
# How often each of n devices in a ring sends the bytes of the exchange's result.
_SENT = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,  # its result is one device's part
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}
_EXCHANGE = re.compile(rf" = (.+?) ({'|'.join(_SENT)})(-start)?\(")
_SHAPE = re.compile(r"\w+\[[\d,]*\]")
_CALLED = re.compile(r"(?:body|to_apply|calls|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


def bytes_by_kind(hlo: str) -> dict[str, float]:
    """{kind of exchange: bytes that one device sends}; a loop's exchanges count once per turn.

    Raises ValueError for a loop with an exchange if the HLO does not say how often it turns.
    """
    computations = _computations(hlo)
    entry = next(name for name in computations if name.startswith("ENTRY "))
    sums: dict[str, float] = {}

    def walk(name: str, times: int) -> None:
        for line in computations[name]:
            if found := _EXCHANGE.search(line):
                shapes, kind, is_start = found.groups()
                if is_start and kind != "all-reduce":
                    shapes = _SHAPE.findall(shapes)[-1]  # after the operand
                sent = _SENT[kind](_group_size(line)) * _size(shapes) * times
                sums[kind] = sums.get(kind, 0.0) + sent
            for called in _called(line):
                turns = 1
                if "body=" in line and f"body=%{called}" in line:
                    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
                    if not known and _holds_exchange(computations, called):
                        raise ValueError(f"the number of turns of the loop {called} is unknown")
                    turns = int(known[1]) if known else 1
                walk(called, times * turns)

    walk(entry, 1)
    return sums


def _computations(hlo: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in hlo.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            lines = found.setdefault((head[1] or "") + head[2], [])
        elif line.startswith(" "):
            lines.append(line)
    return found


def _called(line: str) -> list[str]:
    branches = [name for names in _BRANCHES.findall(line) for name in names.split(",")]
    return [*_CALLED.findall(line), *(name.strip().lstrip("%") for name in branches)]


def _holds_exchange(computations, name: str) -> bool:
    return any(
        _EXCHANGE.search(line) or any(_holds_exchange(computations, n) for n in _called(line))
        for line in computations[name]
    )


def _size(shapes: str) -> int:
    return sum(
        _BYTES[kind] * math.prod(int(n) for n in axes.split(",") if n)
        for kind, axes in re.findall(r"(\w+)\[([\d,]*)\]", shapes)
    )


def _group_size(line: str) -> int:
    """The number of devices that exchange with each other.

    Raises ValueError if the line names them in an unknown notation.
    """
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(iota[1])
    if groups := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(groups[1].split(","))
    # Axes of a mesh: mesh['a'=2,'b'=4] {'b'}; a part of an axis: {'b':(1)2}.
    if groups := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line):
        sizes = dict(re.findall(r"('\w+')=(\d+)", groups[1]))
        axes = re.findall(r"('\w+')(?::\(\d+\)(\d+))?", groups[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if "source_target_pairs" in line:
        return 2  # a permutation: each sends once
    raise ValueError(f"the devices of this exchange are unknown: {line.strip()[:200]}")
