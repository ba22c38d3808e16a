"""torch.func and torch.compile over the Triton kernels, against the reference."""

from typing import Any

import pytest
import torch
from torch.func import functional_call, grad, vmap
from torch.utils._pytree import tree_leaves

import rnnfast


@pytest.mark.parametrize("in_dims", [(None, 0), (0, None), (0, 0)], ids=["inputs", "weights", "both"])
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_vmap_of_grad(name: str, in_dims: Any, device: torch.device) -> None:
    layer = getattr(rnnfast, name)(2, 3, bidirectional=True, device=device)
    parameters = {key: parameter.detach() for key, parameter in layer.named_parameters()}
    weights = parameters if in_dims[0] is None else {k: torch.stack([p, p * 0.5]) for k, p in parameters.items()}
    input = torch.randn(2, 3, 2, 2, device=device)
    input = input if in_dims[1] == 0 else input[0]

    def gradients(backend: str) -> list[torch.Tensor]:
        layer.backend = backend

        def loss(parameters: Any, input: torch.Tensor) -> torch.Tensor:
            return functional_call(layer, parameters, (input,))[0].pow(2).sum()

        return tree_leaves(vmap(grad(loss, (0, 1)), in_dims)(weights, input))

    torch.testing.assert_close(gradients("triton"), gradients("reference"), rtol=1e-4, atol=1e-5)
