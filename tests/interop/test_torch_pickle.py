import pickle

import pytest
from test_torch_file import peak_bytes

from maeast_jax.interop import torch_pickle


def test_a_graph_holds_calls_as_nodes():
    value = {"a": [1, (2.5, None)], "b": complex(1, 2)}
    graph = torch_pickle.parse(pickle.dumps(value, 2), torch_pickle.Budget(0))
    assert (graph.name, graph.arguments, graph.state) == ("builtins.dict", (), None)
    (a, items), (b, call) = graph.items
    assert (a, items.name, items.items) == ("a", "builtins.list", [1, (2.5, None)])
    assert (b, call.name, call.arguments) == ("b", "builtins.complex", (1.0, 2.0))


FLOODS = {
    "lists": b"]",
    "dicts": b"}",
    "marks": b"(",
    "constants": b"N",
    "numbers": b"M\xff\xff",
    "floats": b"G" + bytes(8),
    "names": b"cm\nn\n",
    "tuples": b"N\x85",
    "references": b"NQ",
    "items": b"]Na",
    "pairs": b"}NNs",
    "calls": b"cm\nn\n)R",
    "calls of one name": b"h\x00)R",
    "calls of calls": b"h\x00)R)R",
    "states": b"h\x00)R}b",
    "deep": b"\x85",
    "deep calls": b")R",
    "memory": b"r%b",
}


@pytest.mark.parametrize("name", FLOODS)
def test_a_small_pickle_cannot_fill_the_memory(monkeypatch, name):
    monkeypatch.setattr(torch_pickle, "_SPARE_BYTES", 1 << 19)
    flood = FLOODS[name]
    if name == "memory":
        repeated = b"".join(flood % i.to_bytes(4, "little") for i in range(30_000))
    else:
        repeated = flood * (150_000 // len(flood))
    data = b"cm\n" + b"n" * 10_000 + b"\nq\x00" + repeated + b"."
    budget = torch_pickle.Budget(len(data))

    def parse():
        try:
            torch_pickle.parse(data, budget)
        except torch_pickle.TorchFileError as error:
            assert "over four times its size" in str(error)

    assert peak_bytes(parse) < 2 * (4 * len(data) + (1 << 19))


def test_items_of_one_container_take_less_than_containers():
    """A long list of numbers, as a history of losses, is no attack."""
    losses = pickle.dumps([i / 7 for i in range(100_000)], 2)
    graph = torch_pickle.parse(losses, torch_pickle.Budget(len(losses)))
    assert len(graph.items) == 100_000
