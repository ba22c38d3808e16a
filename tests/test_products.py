"""The products around a GPU's scan leave their arguments alone."""

from __future__ import annotations

import pytest
import torch

from rnnfast.backends import products


@pytest.mark.parametrize("inputs", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gate_inputs_of_token_ids_do_not_write_into_the_weights(inputs: int, dtype: torch.dtype) -> None:
    w_ih, b_ih = torch.randn(2, 4, inputs, dtype=dtype), torch.randn(2, 4, dtype=dtype)
    before = w_ih.clone()
    table, ids = products.gate_inputs(torch.zeros(5, dtype=torch.int64), w_ih, b_ih)
    assert ids is not None
    torch.testing.assert_close(w_ih, before, rtol=0, atol=0)
    torch.testing.assert_close(table, w_ih.flatten(0, 1).t().float() + b_ih.flatten().float())
