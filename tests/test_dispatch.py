"""How a backend is chosen: by name without fall-back, by context, by `auto`; and how the choice is explained."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from functools import partial
from typing import Any

import pytest
import torch

import rnnfast


def test_table_lists_every_backend_with_a_note() -> None:
    table = rnnfast.backends()
    assert {"reference", "torch"} <= {status.name for status in table if status.available}
    text = repr(table)
    for status in table:
        assert status.note
        assert status.name in text
        assert status.note in text


def test_a_backend_is_loaded_once_by_many_threads() -> None:
    code = """if True:
        import threading, torch
        from rnnfast import dispatch
        request, begin = dispatch.Request("lstm", "cpu", torch.float32, False, False), threading.Barrier(8)
        found = []
        def ask():
            begin.wait()
            found.append(dispatch.choose(request, "triton").backend)
        threads = [threading.Thread(target=ask) for _ in range(8)]
        [thread.start() for thread in threads], [thread.join() for thread in threads]
        print(*found)
    """
    pytest.importorskip("triton")
    environment, command = os.environ | {"TRITON_INTERPRET": "1"}, [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["triton"] * 8
    assert "verrid" not in done.stderr  # torch's warning of operators that are registered again


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_that_was_forked_while_a_lock_was_held_finds_it_free() -> None:
    code = """if True:
        import os, threading
        from rnnfast import dispatch, stream
        from rnnfast.lm.generate import _modes
        locks = dispatch._loading, stream._one_at_a_time, _modes
        held, end = threading.Event(), threading.Event()
        def hold():
            with locks[0].lock, locks[1].lock, locks[2].lock:
                held.set()
                end.wait()
        threading.Thread(target=hold).start()
        held.wait()
        child = os.fork()
        if child == 0:
            os._exit(not all(lock.lock.acquire(timeout=5) for lock in locks))
        end.set()
        raise SystemExit(os.waitpid(child, 0)[1])
    """
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    for call in (
        lambda: rnnfast.RNN(3, 4, backend="cudnn"),
        lambda: rnnfast.use_backend("cudnn").__enter__(),
        lambda: rnnfast.functional.rnn(
            torch.randn(2, 1, 3),
            torch.randn(1, 1, 4),
            [rnnfast.functional.Weights(torch.randn(4, 3), torch.randn(4, 4))],
            backend="cudnn",
        ),
    ):
        with pytest.raises(ValueError, match=r"unknown rnnfast backend .cudnn.; choose from auto, cpu"):
            call()


def test_a_backend_asked_for_by_name_never_falls_back() -> None:
    layer = rnnfast.GRU(3, 4, backend="torch")
    with pytest.raises(RuntimeError, match=r"backend .torch. cannot run this gru: torch\.nn's kernels have no vmap"):
        torch.vmap(lambda input: layer(input)[0])(torch.randn(6, 5, 2, 3))


def test_context_holds_within_its_block_and_thread() -> None:
    layer, input = rnnfast.GRU(3, 4), torch.randn(5, 2, 3)
    before = rnnfast.explain(layer, input).backend
    elsewhere = []
    with rnnfast.use_backend("reference"):
        assert rnnfast.explain(layer, input).backend == "reference"
        assert rnnfast.explain(rnnfast.GRU(3, 4, backend="torch"), input).backend == "torch"
        thread = threading.Thread(target=lambda: elsewhere.append(rnnfast.explain(layer, input).backend))
        thread.start()
        thread.join()
        with rnnfast.use_backend("torch"):
            assert rnnfast.explain(layer, input).backend == "torch"
        assert rnnfast.explain(layer, input).backend == "reference"
    assert rnnfast.explain(layer, input).backend == before
    assert elsewhere == [before]


@pytest.mark.parametrize("what", ["layer", "stack", "states", "cell"])
def test_context_holds_in_a_compiled_graph(what: str) -> None:
    layer, stack = rnnfast.LSTM(3, 4), rnnfast.Stack("lstm", 3, [4], zoneout=0.1)
    cell, input = rnnfast.LSTMCell(3, 4), torch.randn(5, 2, 3)
    calls: dict[str, Any] = {"layer": layer, "stack": stack, "states": layer.states, "cell": lambda x: cell(x[0])}
    call, graphs = calls[what], []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph.code)
        return graph

    def within(x: torch.Tensor) -> Any:
        with rnnfast.use_backend("reference"):
            return call(x)

    def around(x: torch.Tensor) -> Any:
        return call(x)

    torch._dynamo.reset()
    torch.compile(within, fullgraph=True, backend=backend)(input)
    compiled = torch.compile(around, fullgraph=True, backend=backend)
    compiled(input)
    with rnnfast.use_backend("reference"):
        compiled(input)
    compiled(input)
    chosen = ["_reference" in code for code in graphs]
    assert chosen == [True, False, True]


def test_explain_knows_of_autocast() -> None:
    input = torch.randn(5, 2, 3)
    for layer in (rnnfast.LSTM(3, 4), rnnfast.Stack("lstm", 3, [4], layer_norm=True)):
        assert rnnfast.explain(layer, input).backend == "cpu"
        with torch.autocast("cpu", torch.float16):
            choice = rnnfast.explain(layer, input)
            assert choice.backend != "cpu"
            layer(input)
        assert "float16" in repr(choice) or "float32, float64 and bfloat16" in repr(choice)
    with torch.autocast("cpu", torch.float16):  # a cell computes in its weights' type all the same
        assert rnnfast.explain(rnnfast.LSTMCell(3, 4), input[0]).backend == "cpu"


def test_explain_refuses_for_a_cell_what_its_call_does() -> None:
    packed = torch.nn.utils.rnn.pack_sequence([torch.ones(2, 3)])
    for call in (rnnfast.GRUCell(3, 4), partial(rnnfast.explain, rnnfast.GRUCell(3, 4))):
        with pytest.raises(TypeError, match="a cell takes a tensor, got PackedSequence"):
            call(packed)


def test_explain_knows_of_transforms() -> None:
    """As the call, it refuses a backend asked for by name that has none."""
    for layer, input in ((rnnfast.LSTM(3, 4), torch.randn(5, 2, 3)), (rnnfast.LSTMCell(3, 4), torch.randn(2, 3))):
        layer.backend = "torch"
        assert rnnfast.explain(layer, input).backend == "torch"
        for call in (layer, partial(rnnfast.explain, layer)):
            with pytest.raises(RuntimeError, match="no vmap or forward-mode AD"):
                torch.vmap(call)(input.expand(6, *input.shape))


def test_explain_tells_what_was_passed_over_and_why() -> None:
    layer = rnnfast.LSTM(3, 4)
    with rnnfast.use_backend("reference"):
        assert str(rnnfast.explain(layer, torch.randn(5, 2, 3))) == "reference: asked for by name"
    choice = rnnfast.explain(layer.half(), torch.randn(5, 2, 3).half())
    assert choice.backend == "torch"
    assert "not cpu: " in str(choice)
    assert "torch.func and forward-mode AD: reference" in str(choice)
    assert "states() with gradients: reference" in str(choice)
    layer.backend = "torch"
    refused = "states() with gradients: refused: it has no gradients of c of every step, which the reference has"
    assert refused in str(rnnfast.explain(layer, torch.randn(5, 2, 3).half()))
    assert "states()" not in str(rnnfast.explain(rnnfast.LSTM(3, 4), torch.randn(5, 2, 3)))
    assert "states()" not in str(rnnfast.explain(rnnfast.GRU(3, 4).half(), torch.randn(5, 2, 3).half()))


def test_the_core_needs_only_torch() -> None:
    """The layers work where none of the other packages is installed, and import nothing of the pipeline."""
    code = (
        "import sys; absent = 'triton ninja numpy safetensors tqdm jsonargparse yaml matplotlib'.split(); "
        "sys.modules.update(dict.fromkeys(absent)); import torch, rnnfast; layer = rnnfast.GRU(3, 4)\n"
        "for _ in range(2): layer(torch.randint(3, (5, 2)))[0].sum().backward()\n"
        "with torch.no_grad(): layer(torch.randn(5, 2, 3)); rnnfast.GRUCell(3, 4)(torch.randn(2, 3))\n"
        "parts = tuple(f'rnnfast.{part}' for part in ('lm', 'cli', 'd2l', 'bench'))\n"
        "print([m for m in sys.modules if m.startswith(parts)])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"
