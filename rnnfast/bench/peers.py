"""Other libraries that run recurrent layers on a CPU: ONNX Runtime and JAX (`pip install 'rnnfast[peers]'`).

Each gets the layer's own weights. What is not installed, or cannot do a case, does not take part.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rnnfast.bench.layers import FORWARD, Contestant, Setup
from rnnfast.onnx import GATE_ORDER

ONNXRUNTIME, JAX = "onnxruntime", "jax"


def missing() -> list[str]:
    """The packages that would have to be installed for all peers to take part."""
    return [name for name in ("onnxruntime", "onnx", "jax") if importlib.util.find_spec(name) is None]


def layer_peers(setup: Setup) -> dict[str, Contestant]:
    """The peers for a case; both are float32 here, and neither knows packed sequences. ONNX Runtime has no backward."""
    case, absent = setup.case, missing()
    found: dict[str, Contestant] = {}
    if case.dtype != "float32" or case.packed or case.token_ids:
        return found
    if case.direction == FORWARD and "onnx" not in absent and "onnxruntime" not in absent:
        found[ONNXRUNTIME] = _onnx_contestant(setup)
    # XLA takes every core it may run on: with fewer torch threads it would have more than the others.
    if "jax" not in absent and torch.get_num_threads() == len(os.sched_getaffinity(0)):
        found[JAX] = _jax_contestant(setup)
    return found


# ONNX Runtime


def onnx_session(layer: nn.RNNBase, steps: int, batch: int, with_state: bool) -> Any:
    """An ONNX Runtime session that runs a one-layer, one-directional torch.nn layer, on as many threads as torch.

    Its inputs are X (T, B, I) and, `with_state`, h_0 and for an LSTM c_0 (1, B, H); its outputs Y (T, 1, B, H), h_n and
    for an LSTM c_n.
    """
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    cell, hidden = layer.mode.lower(), layer.hidden_size
    lstm = cell == "lstm"

    def reorder(parameter: Any) -> Any:
        array = parameter.detach().numpy()
        gates = array.reshape(len(GATE_ORDER[cell]), hidden, *array.shape[1:])
        return gates[list(GATE_ORDER[cell])].reshape(1, *array.shape)

    bias = np.concatenate([reorder(layer.bias_ih_l0), reorder(layer.bias_hh_l0)], axis=1)
    weights = {"W": reorder(layer.weight_ih_l0), "R": reorder(layer.weight_hh_l0), "B": bias}
    state_names = (["h_0", "c_0"] if lstm else ["h_0"]) if with_state else []
    state_shape = [1, batch, hidden]
    attributes: dict[str, Any] = {"hidden_size": hidden}
    if cell == "gru":
        attributes["linear_before_reset"] = 1  # torch.nn's form
    if cell.startswith("rnn"):
        attributes["activations"] = ["Relu" if cell == "rnn_relu" else "Tanh"]
    outputs = ["Y", "h_n", "c_n"] if lstm else ["Y", "h_n"]
    node = helper.make_node(
        "LSTM" if lstm else "GRU" if cell == "gru" else "RNN",
        ["X", "W", "R", "B", *(["", *state_names] if state_names else [])],
        outputs,
        **attributes,
    )

    def value(name: str, shape: list[int]) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    graph = helper.make_graph(
        [node],
        "layer",
        [value("X", [steps, batch, layer.input_size]), *(value(name, state_shape) for name in state_names)],
        [value("Y", [steps, 1, batch, hidden]), *(value(name, state_shape) for name in outputs[1:])],
        [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads spin while a run lasts, as ever, but not on into the next contestant's turn.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _onnx_contestant(setup: Setup) -> Contestant:
    case = setup.case
    session = onnx_session(setup.theirs, case.steps, case.batch, with_state=False)
    inputs = {"X": setup.input.numpy()}
    names = ("output", "h_n", "c_n")

    def results(values: list[Any]) -> dict[str, Tensor]:
        tensors = dict(zip(names, map(torch.from_numpy, values), strict=False))
        return tensors | {"output": tensors["output"].squeeze(1)}

    return Contestant(lambda: session.run(None, inputs), results)


# JAX


def _jax_layer(cell: str) -> Callable[..., Any]:
    """A layer as JAX's users write one: the input products of all steps at once, then `lax.scan` over the steps."""
    import jax
    import jax.numpy as jnp

    def rnn(activation: Any) -> Any:
        def step(w_hh: Any, b_hh: Any, state: Any, gx: Any) -> Any:
            h = activation(gx + state[0] @ w_hh.T + b_hh)
            return (h,), h

        return step

    def lstm(w_hh: Any, b_hh: Any, state: Any, gx: Any) -> Any:
        i, f, g, o = jnp.split(gx + state[0] @ w_hh.T + b_hh, 4, axis=-1)
        c = jax.nn.sigmoid(f) * state[1] + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    def gru(w_hh: Any, b_hh: Any, state: Any, gx: Any) -> Any:
        (h,) = state
        gx_r, gx_z, gx_n = jnp.split(gx, 3, axis=-1)
        gh_r, gh_z, gh_n = jnp.split(h @ w_hh.T + b_hh, 3, axis=-1)
        r, z = jax.nn.sigmoid(gx_r + gh_r), jax.nn.sigmoid(gx_z + gh_z)
        n = jnp.tanh(gx_n + r * gh_n)
        h = (1 - z) * n + z * h
        return (h,), h

    step = {"rnn": rnn(jnp.tanh), "rnn_relu": rnn(jax.nn.relu), "lstm": lstm, "gru": gru}[cell]
    states = 2 if cell == "lstm" else 1

    def layer(parameters: dict[str, Any], x: Any) -> Any:
        w_ih, w_hh, b_ih, b_hh = (parameters[f"{name}_l0"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        state = (jnp.zeros((x.shape[1], w_hh.shape[1]), x.dtype),) * states
        state, output = jax.lax.scan(functools.partial(step, w_hh, b_hh), state, x @ w_ih.T + b_ih)
        return output, state

    return layer


def _jax_contestant(setup: Setup) -> Contestant:
    import jax
    import jax.numpy as jnp

    cpu = jax.devices("cpu")[0]
    layer = _jax_layer(setup.case.cell)
    with jax.default_device(cpu):
        parameters = {name: jnp.array(p.detach().numpy()) for name, p in setup.theirs.named_parameters()}
        x, d_output = jnp.array(setup.input.numpy()), jnp.array(setup.d_output.numpy())

    def tensor(array: Any) -> Tensor:
        return torch.from_numpy(np.array(array))

    def outputs(output: Any, state: Any) -> dict[str, Tensor]:
        states = {name: tensor(part)[None] for name, part in zip(("h_n", "c_n"), state, strict=False)}
        return {"output": tensor(output)} | states

    if setup.case.direction == FORWARD:
        forward = jax.jit(layer)
        return Contestant(lambda: jax.block_until_ready(forward(parameters, x)), lambda result: outputs(*result))

    def run(parameters: Any, x: Any, d_output: Any) -> Any:
        output, backward, state = jax.vjp(layer, parameters, x, has_aux=True)
        return (output, state), backward(d_output)

    both = jax.jit(run)

    def results(result: Any) -> dict[str, Tensor]:
        (output, state), (d_parameters, d_x) = result
        gradients = {f"d_{name}": tensor(d_parameters[name]) for name in parameters}
        return outputs(output, state) | gradients | {"d_input": tensor(d_x)}

    return Contestant(lambda: jax.block_until_ready(both(parameters, x, d_output)), results)
