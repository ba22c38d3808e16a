"""torch.utils.flop_counter counts a scan's products."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import rnnfast

STEPS, BATCH, INPUTS, HIDDEN = 7, 3, 5, 8
ROWS = STEPS * BATCH


def flops(module: nn.Module, *args: Any, train: bool = False) -> int:
    with FlopCounterMode(display=False) as counter:
        output = module(*args)[0]
        if train:
            output.sum().backward()
    return int(counter.get_total_flops())


def test_a_gru_has_those_of_torch_nn() -> None:
    x = torch.randn(STEPS, BATCH, INPUTS)
    theirs, ours = (library.GRU(INPUTS, HIDDEN, num_layers=2, bidirectional=True) for library in (nn, rnnfast))
    assert flops(ours, x) == flops(theirs, x) > 0


def test_they_are_counted_although_somebody_has_asked_for_the_module_before() -> None:
    code = """
import importlib.util, torch, rnnfast
assert importlib.util.find_spec("torch.utils.flop_counter") is not None
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    rnnfast.GRU(3, 4)(torch.randn(5, 2, 3))
assert counter.get_total_flops() > 0
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
def test_forward_and_backward(backend: str) -> None:
    layer, x = rnnfast.LSTM(INPUTS, HIDDEN, proj_size=4, backend=backend), torch.randn(STEPS, BATCH, INPUTS)
    of_input, recurrent = 4 * HIDDEN * INPUTS, 4 * HIDDEN * 4 + 4 * HIDDEN
    forward, weights = 2 * ROWS * (of_input + recurrent), 2 * ROWS * (of_input + recurrent)
    for _ in range(2):  # a later call may take a shorter way
        assert flops(layer, x) == forward
        with torch.no_grad():
            assert flops(layer, x) == forward
        assert flops(layer, x, train=True) == forward + 2 * ROWS * recurrent + weights
        leaf = x.clone().requires_grad_()
        assert flops(layer, leaf, train=True) == forward + 2 * ROWS * (recurrent + of_input) + weights


def test_token_ids_stand_for_no_product() -> None:
    layer, ids = rnnfast.RNN(INPUTS, HIDDEN), torch.randint(INPUTS, (STEPS, BATCH))
    assert flops(layer, ids) == 2 * ROWS * HIDDEN * HIDDEN


def test_a_stack_with_an_extended_recurrence() -> None:
    stack, x = rnnfast.Stack("gru", INPUTS, [HIDDEN], layer_norm=True, backend="cpu"), torch.randn(STEPS, BATCH, INPUTS)
    assert flops(stack, x) == 2 * ROWS * 3 * HIDDEN * (INPUTS + HIDDEN)


def test_the_counter_may_be_imported_later_and_is_not_by_us() -> None:
    code = """
import sys, rnnfast, torch
assert "torch.utils.flop_counter" not in sys.modules
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    rnnfast.GRU(5, 8)(torch.randn(7, 3, 5))
assert counter.get_total_flops() == 2 * 7 * 3 * 24 * 13, counter.get_total_flops()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
