"""Without a GPU the kernels run in Triton's interpreter, which must be switched on before Triton is imported."""

import os

import pytest
import torch

from rnnfast.backends import triton as backend

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def device() -> torch.device:
    """A GPU, or the CPU with the kernels interpreted."""
    reason = backend.why_not()
    if reason is not None:
        pytest.skip(reason)
    backend.load()
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
