"""How much work the unit graph does beyond what torch.export does."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import Net
from torch import Tensor, nn
from torch.export.graph_signature import ExportGraphSignature

from fastplastic.graph import build, build_graph
from fastplastic.graph.ledger import Ledger
from fastplastic.graph.rules_elementwise import _merge, _pairs
from fastplastic.graph.values import Value, distinct, without_common_repeats


def chain(depth: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(depth)))


@pytest.fixture
def threads() -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


def test_graphs_are_read_on_one_thread(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int]] = []

    def noted(name: str) -> Any:
        function = getattr(build, name)

        def call(*args: Any) -> Any:
            seen.append((name, torch.get_num_threads()))
            return function(*args)

        return call

    for name in ("export_program", "_read", "layers_of"):
        monkeypatch.setattr(build, name, noted(name))
    build_graph(chain(1), torch.randn(1, 4))
    assert set(seen) == {("export_program", 3), ("_read", 1), ("layers_of", 1)}
    assert torch.get_num_threads() == threads


def test_threads_are_given_back_after_an_error(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "layers_of", fail)
    with pytest.raises(KeyboardInterrupt):
        build_graph(chain(1), torch.randn(1, 4))
    assert torch.get_num_threads() == threads


def test_signatures_are_read_once_per_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of their tables is made anew, over all inputs, whenever it is asked for."""
    asked: Counter[str] = Counter()
    for name in ("inputs_to_buffers", "inputs_to_lifted_tensor_constants"):
        real = getattr(ExportGraphSignature, name)

        def table(self: ExportGraphSignature, name: str = name, real: Any = real) -> Any:
            asked[name] += 1
            return real.fget(self)

        monkeypatch.setattr(ExportGraphSignature, name, property(table))
    numbers = []
    for depth in (1, 8):
        asked.clear()
        build_graph(chain(depth), torch.randn(1, 4))
        numbers.append(dict(asked))
    assert numbers[0] == numbers[1] and numbers[0]["inputs_to_buffers"] > 0


def test_groups_are_looked_up_for_joined_units_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, looked_up = Ledger(), []
    ledger.new_units(1000)
    ledger.couple(7, 5)
    ledger.couple(9, 5)
    ledger.leak(torch.tensor([9, 20], dtype=torch.int32), "mixed")
    find = Ledger.find
    monkeypatch.setattr(
        Ledger, "find", lambda self, unit: looked_up.append(unit) or find(self, unit)
    )
    ledger.settle()
    assert ledger.code.nonzero().flatten().tolist() == [5, 7, 9, 20]
    assert set(looked_up) == {5, 7, 9}


def test_a_group_has_the_reason_of_its_first_marked_member() -> None:
    ledger = Ledger()
    ledger.new_units(7)
    for first, other in ((1, 3), (1, 4), (2, 5), (2, 6)):
        ledger.couple(first, other)
    for unit, reason in ((4, "late"), (3, "early"), (5, "alone"), (2, "first")):
        ledger.leak(torch.tensor([unit], dtype=torch.int32), reason)
    ledger.settle()
    texts = [ledger.texts[code] for code in ledger.code.tolist()]
    assert texts == ["", "early", "first", "early", "late", "alone", "first"]


def test_depthwise_filters_and_what_they_follow_share_a_fate() -> None:
    ledger = Ledger()
    ledger.new_units(6)
    ledger.follows += [(0, 2), (1, 3), (2, 4), (3, 5)]
    ledger.leak(torch.tensor([4], dtype=torch.int32), "summed")
    ledger.settle()
    texts = [ledger.texts[code] for code in ledger.code.tolist()]
    text = "its depthwise filter is not hidden: "
    assert texts == [f"{text}{text}summed", "", f"{text}summed", "", "summed", ""]
    assert [ledger.find(unit) for unit in range(6)] == [0, 1, 2, 1, 4, 1]


@pytest.mark.parametrize(
    ("first", "second", "pairs"),
    [
        ([[4, 5], [4, 5]], [[9, 8], [9, 8]], [(4, 9), (5, 8)]),
        ([[5, 4], [5, 4]], [[9, 8], [9, 8]], [(4, 8), (5, 9)]),
        ([[4, 5], [4, 5]], [[9, 8], [8, 9]], None),  # one unit meets two
        ([[4, 5]], [[9, 9]], None),  # two meet one
        ([[4, -1]], [[9, 8]], None),  # one meets no unit
        ([[4, 5]], [[9, -2]], None),
    ],
)
def test_pairs_of_units(first: Any, second: Any, pairs: Any) -> None:
    ones, twos = (torch.tensor(x, dtype=torch.int32) for x in (first, second))
    assert _pairs(ones, twos) == pairs
    assert _pairs(*(x.expand(3, *x.shape) for x in (ones, twos))) == pairs


def test_sums_keep_expanded_dimensions_expanded() -> None:
    """A sum over a large map costs as much as its channels."""
    seen = []

    class Books(Ledger):
        def leak(self, ids: Tensor | None, reason: str) -> None:
            assert ids is not None
            seen.append(ids.numel())

    shape = (1, 4, 50, 50)
    ids = [torch.arange(4 * n, 4 * n + 4).int().view(1, 4, 1, 1).expand(shape) for n in range(2)]
    ids[1] = torch.where(torch.tensor([True, False, True, False]).view(1, 4, 1, 1), ids[0], ids[1])
    ids[1] = ids[1][:, :, :1, :1].expand(shape)
    node = torch.fx.Graph().placeholder("x")
    node.meta["val"] = torch.empty(shape)
    made = _merge(Books(), node, Value(shape, ids[0]), Value(shape, ids[1]), "summed")
    assert seen == [4, 4]
    assert made.shape == shape and made.ids is not None and made.ids.shape == shape
    assert made.ids[0, :, 7, 9].tolist() == [0, -1, 2, -1]


def test_repeats_are_dropped_where_all_tensors_have_them() -> None:
    rows, columns = torch.arange(3).view(3, 1).expand(3, 4), torch.arange(4).expand(3, 4)
    assert [x.shape for x in without_common_repeats(rows, columns)] == [(3, 4), (3, 4)]
    assert [x.shape for x in without_common_repeats(rows, rows + 0)] == [(3, 4), (3, 4)]
    assert [x.shape for x in without_common_repeats(rows, rows)] == [(3, 1), (3, 1)]


def test_distinct_units() -> None:
    units = torch.tensor([[70_000, -1], [3, -2], [70_000, 5]], dtype=torch.int32)
    assert distinct(units) == [3, 5, 70_000]
    assert distinct(units.expand(2, 3, 2)) == [3, 5, 70_000]
    assert distinct(torch.full((2,), -1)) == [] and distinct(torch.zeros(0)) == []


def test_layers_of_units_are_counted_layer_by_layer() -> None:
    net = Net(lambda self, x: self.c(torch.relu(self.a(x))) + self.b(x),
              a=nn.Linear(3, 5), b=nn.Linear(3, 2), c=nn.Linear(5, 2))  # fmt: skip
    ledgers = []
    layers_of = build.layers_of
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "layers_of", lambda x: ledgers.append(x) or layers_of(x))
        build_graph(net, torch.randn(1, 3))
    by_name = {layer.name: layer for layer in ledgers[0].layers}
    a, c = by_name["a"].start, by_name["c"].start
    assert c == a + 5
    counts = ledgers[0].counts([a, a + 1, a + 4, c])
    assert {layer.name: number for layer, number in counts} == {"a": 3, "c": 1}
