"""The graph of calls that a pickle describes, without importing or calling anything.

Of opcodes (pickletools) only those of protocol 2, which torch.save writes, and bytes of protocol 3.
"""

import pickletools
from typing import Any

_SPARE_BYTES = 1 << 26
_VALUE_BYTES = 64  # about what a scalar or an opcode's own bookkeeping takes
_NODE_BYTES = 256  # and a container, as a node and once more as what is made of it
_LITERALS = {
    "BININT",
    "BININT1",
    "BININT2",
    "LONG1",
    "LONG4",
    "BINFLOAT",
    "BINUNICODE",
    "BINBYTES",
    "SHORT_BINBYTES",
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_EMPTY = {"EMPTY_DICT": "builtins.dict", "EMPTY_LIST": "builtins.list"}
_NODES = {*_EMPTY, "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "GLOBAL", "REDUCE", "NEWOBJ", "BINPERSID"}


class TorchFileError(ValueError):
    """A file that torch.save did not write, is damaged, or holds what is not read; one line."""


class Budget:
    """Counts bytes that are taken, so that a small file cannot fill the memory.

    Args:
      file_bytes: the file's size, of which four times may be taken, and 64 MiB besides.
    """

    def __init__(self, file_bytes: int):
        self._left_bytes = 4 * file_bytes + _SPARE_BYTES

    def spend(self, nbytes: int) -> None:
        """Counts `nbytes` more; TorchFileError where they are too many."""
        self._left_bytes -= nbytes
        if self._left_bytes < 0:
            raise TorchFileError(
                "its values take over four times its size; save clones of its views, and tensors"
                " in place of long lists"
            )


class Node:
    """A name (arguments are None) or a call of it, with what the pickle puts into the result.

    Lists and dicts are calls too, so that no key is hashed before it has been checked.
    """

    __slots__ = ("arguments", "items", "name", "state")

    def __init__(self, name: str, arguments: tuple | None = None):
        self.name = name
        self.arguments = arguments
        self.items = []  # of a dict: pairs
        self.state = None


def parse(data: bytes, budget: Budget) -> Any:
    """The graph that a pickle describes: nodes, tuples, scalars.

    Raises TorchFileError for other opcodes or a graph past the budget, and errors of any type for
    what is no pickle.
    """
    stack, marks, memo = [], [], {}
    for opcode, argument, _ in pickletools.genops(data):
        budget.spend(_NODE_BYTES if opcode.name in _NODES else _VALUE_BYTES)
        takes = opcode.stack_before
        if pickletools.stackslice in takes:  # what lies above the last mark, as a list
            mark = marks.pop()
            start = max(mark - takes.index(pickletools.markobject), 0)
            operands = [*stack[start:mark], stack[mark:]]
        else:
            start = max(len(stack) - len(takes), 0)
            operands = stack[start:]
        del stack[start:]
        match [opcode.name, *operands]:
            case [name, *_] if name in _LITERALS:
                stack.append(argument)
            case [name, *_] if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            case ["BINPUT" | "LONG_BINPUT", *_]:
                memo[argument] = stack[-1]
            case ["BINGET" | "LONG_BINGET", *_]:
                stack.append(memo[argument])
            case ["MARK", *_]:
                marks.append(len(stack))
            case ["TUPLE1" | "TUPLE2" | "TUPLE3", *items] | ["TUPLE", list(items)]:
                stack.append(tuple(items))
            case [name, *_] if name in _EMPTY:
                stack.append(Node(_EMPTY[name], ()))
            case ["APPEND", Node() as node, *items] | ["APPENDS", Node() as node, list(items)]:
                node.items.extend(items)
                stack.append(node)
            case ["SETITEM", Node() as node, *items] | ["SETITEMS", Node() as node, list(items)]:
                node.items.extend(zip(items[::2], items[1::2], strict=True))
                stack.append(node)
            case ["GLOBAL", *_]:  # `__builtin__` is Python 2's name
                name = argument.replace(" ", ".", 1).replace("__builtin__.", "builtins.")
                stack.append(Node(name))
            case ["REDUCE" | "NEWOBJ", Node() as called, tuple(arguments)]:
                name = called.name if called.arguments is None else f"{called.name:.100}()"
                stack.append(Node(name, arguments))
            case ["BUILD", Node() as node, state]:
                node.state = state
                stack.append(node)
            case ["BINPERSID", identity]:
                stack.append(Node("storage", (identity,)))
            case ["STOP", graph]:
                return graph
            case [name, *_] if name not in ("PROTO", "POP"):
                raise TorchFileError(
                    f"its pickle uses {name} as torch.save's protocol 2 does not; save it with"
                    " torch.save and its default pickle_protocol"
                )
    raise EOFError("its pickle does not end")
