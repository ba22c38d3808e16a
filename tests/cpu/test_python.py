"""The functions of csrc/cpu/python.cpp by themselves: what they answer, and that they take and give back references."""

from __future__ import annotations

import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import rnnfast
from rnnfast.backends import cpu
from rnnfast.direct.plans import HAS, HAS_ITEMS, IS_EMPTY, RETURNS

pytestmark = pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))


@pytest.fixture(autouse=True)
def _loaded() -> None:
    cpu.load()


def holds(module: Any, *conditions: Any) -> Any:
    return cpu.built_in("holds", conditions)(module)


class Unwilling:
    """Raises when it is asked for anything."""

    def __getattr__(self, name: str) -> Any:
        raise ZeroDivisionError(name)

    def __eq__(self, other: object) -> bool:
        raise ZeroDivisionError

    def __bool__(self) -> bool:
        raise ZeroDivisionError

    __hash__ = None  # type: ignore[assignment]


def test_conditions() -> None:
    one, other = object(), object()
    module = SimpleNamespace(name="ab", items={"x": one, "y": other}, list=[one, other], none={}, unwilling=Unwilling())
    assert holds(module) is True
    for condition, expected in (
        ((RETURNS, len, ("ab",), 2), True),
        ((RETURNS, len, ("ab",), 3), False),
        ((RETURNS, len, (3,), 3), False),
        ((HAS, "name", "".join(["a", "b"])), True),  # equal, not the same
        ((HAS, "name", "b"), False),
        ((HAS, "nothing", "b"), False),
        ((HAS, "unwilling", "b"), False),
        ((HAS_ITEMS, "items", ("x", "y"), (one, other), 2), True),
        ((HAS_ITEMS, "items", ("y",), (other,), 2), True),
        ((HAS_ITEMS, "items", ("y",), (other,), 1), False),
        ((HAS_ITEMS, "items", ("x", "y"), (one, one), 2), False),
        ((HAS_ITEMS, "items", ("x", "z"), (one, other), 2), False),
        ((HAS_ITEMS, "list", (0, 1), (one, other), 2), True),
        ((HAS_ITEMS, "list", (0, 2), (one, other), 2), False),
        ((HAS_ITEMS, "nothing", (), (), 0), False),
        ((HAS_ITEMS, "unwilling", (), (), 0), False),
        ((IS_EMPTY, "none"), True),
        ((IS_EMPTY, "items"), False),
        ((IS_EMPTY, "nothing"), False),
        ((IS_EMPTY, "unwilling"), False),
        ((4, "name"), False),
    ):
        assert holds(module, condition) is expected, condition
        assert holds(module, (HAS, "name", "ab"), condition) is expected
        assert holds(module, condition, (HAS, "name", "ab")) is expected
    assert holds(Unwilling(), (HAS, "name", "ab")) is False


def test_items_that_are_equal_are_not_the_same() -> None:
    weight = nn.Parameter(torch.ones(1))
    module = SimpleNamespace(items=[weight])
    assert holds(module, (HAS_ITEMS, "items", (0,), (weight,), 1))
    assert not holds(module, (HAS_ITEMS, "items", (0,), (nn.Parameter(torch.ones(1)),), 1))


def test_a_stamp_has_each_version_and_each_address() -> None:
    weights, fused = [torch.zeros(2), torch.zeros(3)], SimpleNamespace(fused_steps=5)
    stamp = cpu.built_in("stamp", (fused, tuple(weights)))
    stamps = [stamp()]
    assert stamp() == stamps[0]
    for weight in weights:
        weight.add_(1)
        stamps.append(stamp())
        weight.data = torch.zeros(4)
        stamps.append(stamp())
    for steps in (6, -1):
        fused.fused_steps = steps
        stamps.append(stamp())
    assert len(set(stamps)) == 7
    fused.fused_steps = "6"
    with pytest.raises(TypeError):
        stamp()
    fused.fused_steps = 6
    with pytest.raises(AttributeError):
        cpu.built_in("stamp", (object(), ()))()
    with torch.inference_mode():
        weights[0] = torch.zeros(1)
    with pytest.raises(RuntimeError, match="version"):
        cpu.built_in("stamp", (fused, tuple(weights)))()


def test_plain_tensors() -> None:
    plain = torch.zeros(4, 2)
    for tensor, expected in (
        (plain, True),
        (plain.t()[1:], True),
        (plain.double(), False),
        (plain[:0], False),
        (nn.Parameter(plain), False),
        (torch.zeros(2, dtype=torch.complex64).conj().imag, False),  # lazily negated
        (plain.to("meta"), False),
        (plain.to_sparse(), False),
        (None, False),
        (Unwilling(), False),
    ):
        assert cpu.is_plain(tensor, torch.float32) is expected
    assert cpu.is_plain(plain) is False  # whatever is asked in another way
    assert cpu.is_plain(plain, torch.float32, None) is False


def test_tensors_of_other_devices_are_not_plain() -> None:
    """Of a GPU's, for one, which have an address: here something of their form."""

    class Elsewhere:
        dtype, is_cpu = torch.float32, False

        def is_neg(self) -> bool:
            return False

        def data_ptr(self) -> int:
            return 64

    tensor, is_plain = Elsewhere(), cpu.built_in("is_plain", Elsewhere)
    assert is_plain(tensor, torch.float32) is False
    tensor.is_cpu = True
    assert is_plain(tensor, torch.float32) is True


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.uint8], ids=str)
@pytest.mark.parametrize("sizes", [(), (3,), (2, 0, 5), (7, 1, 3), (1 << 9, 1 << 9), (0, 1 << 20)], ids=str)
def test_empty_tensors(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    made, expected = cpu.empty(torch.zeros(1, dtype=dtype), *sizes), torch.empty(sizes, dtype=dtype)
    assert (made.shape, made.stride(), made.dtype) == (expected.shape, expected.stride(), dtype)
    made.zero_()  # it may be written to


def test_small_tensors_and_large_ones_are_made_in_other_ways() -> None:
    empty, like = cpu.built_in("empty", (lambda *given: given, lambda *given: given)), torch.zeros(1)
    kept = (128 << 10) // 4
    assert empty(like, 2, 0, 3) == ((2, 0, 3), (3, 3, 1), torch.float32)
    assert empty(like, kept - 1) == ((kept - 1,), (1,), torch.float32)
    for sizes in ((kept,), (2, kept // 2), (0, kept), (8, 1 << 40, 1 << 40), (0, 1 << 62, 1 << 62)):
        made = empty(like, *sizes)
        assert made[0] is like
        assert made[1:] == (sizes,)


def test_what_is_no_size_is_refused() -> None:
    like = torch.zeros(1)
    for sizes, error in (
        (("a",), TypeError),
        ((1 << 40, 1 << 40), RuntimeError),
        ((1 << 70,), OverflowError),
        ((-1,), RuntimeError),
    ):
        with pytest.raises(error):
            cpu.empty(like, *sizes)
    for given in ((), (3,), (object(), 2)):
        with pytest.raises((TypeError, AttributeError)):
            cpu.empty(*given)


@pytest.mark.parametrize("name", ["infer", "forward", "backward", "weight_gradients", "pack_backward"])
def test_calls_refuse_what_is_no_field(name: str) -> None:
    function, fields = getattr(cpu, name), {"infer": 9, "forward": 17, "backward": 29, "pack_backward": 6}.get(name, 9)
    for given in ((), (0,) * (fields - 1), (0,) * (fields + 1)):
        with pytest.raises(TypeError, match="fields"):
            function(*given)
    with pytest.raises(AttributeError):
        function(*(0,) * (fields - 1), "a")
    with pytest.raises(AttributeError):
        function(-1, *(0,) * (fields - 2), "a")  # -1 is a number as any other
    with pytest.raises(OverflowError):
        function(*(0,) * (fields - 1), 1 << 70)


def test_there_are_no_others() -> None:
    with pytest.raises(TypeError, match="no function"):
        cpu.built_in("holdss", None)


def references(*objects: Any) -> list[int]:
    return [sys.getrefcount(each) for each in objects]


@pytest.mark.parametrize("name", ["RNN", "LSTM"])
def test_references_are_given_back(name: str) -> None:
    layer, input, gradient = getattr(rnnfast, name)(3, 5), torch.randn(2, 3), torch.randn(4, 2, 5)
    sequence, ids, sparse = torch.randn(4, 2, 3), torch.tensor([0, 5]), input.to_sparse()
    stream = rnnfast.Stream(layer)

    def calls() -> None:
        with torch.no_grad():
            for _ in range(100):
                stream(input)
                layer(sequence)
                stream._steps.next(None)  # it declines
                stream._steps.next(ids)
                assert stream._steps.next(sparse) is None  # which has no address: an error that nobody sees
                assert not cpu.is_plain(object(), 3)
        for _ in range(100):
            layer(sequence)[0].backward(gradient)
            layer.zero_grad()

    with torch.no_grad():
        for _ in range(3):
            stream(input)
    calls()
    stepped = stream._steps
    watched = layer, input, sequence, ids, gradient, torch.float32, torch.Tensor, *stepped._places, *layer.parameters()
    before, of_none = references(*watched), sys.getrefcount(None)
    calls()
    assert stream._steps is stepped
    assert references(*watched) == before
    assert abs(sys.getrefcount(None) - of_none) < 50
    now, next_place, _ = stepped._places
    assert now[1] != next_place[1]  # no step writes over the state that it reads


@pytest.mark.parametrize("gradients", [False, True])
def test_calls_let_other_threads_run(gradients: bool) -> None:
    layer, input, ticks, is_over = rnnfast.GRU(4, 128), torch.randn(60_000, 1, 4), [0], threading.Event()
    with torch.set_grad_enabled(gradients):
        layer(input[:9])  # leaves a plan

        def tick() -> None:
            while not is_over.wait(0.001):
                ticks[0] += 1

        thread = threading.Thread(target=tick)
        thread.start()
        before = ticks[0]
        layer(input)
        seen = ticks[0] - before
        is_over.set()
        thread.join()
    assert seen > 5


def test_steps_let_other_threads_run() -> None:
    layer, input, ticks, is_over = rnnfast.GRU(4, 128), torch.randn(60_000, 4), [0], threading.Event()
    stream = rnnfast.Stream(layer)

    def tick() -> None:
        while not is_over.wait(0.001):
            ticks[0] += 1

    thread = threading.Thread(target=tick)
    with torch.no_grad():
        for _ in range(3):
            stream(input)
        thread.start()
        before = ticks[0]
        output = stream._steps.next(input)
        seen = ticks[0] - before
        is_over.set()
        thread.join()
    assert output is not None
    assert seen > 5


def test_threads_that_step_one_stream_at_a_time_or_together_do_no_harm() -> None:
    """What comes out when they meet is nobody's business, but the process goes on, and its states are sound."""
    layer, input = rnnfast.LSTM(8, 64), torch.randn(1, 8)
    stream = rnnfast.Stream(layer)

    def run() -> None:
        with torch.inference_mode():
            for _ in range(500):
                stream(input)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(part.shape == (1, 1, 64) and part.isfinite().all() for part in stream.state)
