"""Without a GPU the kernels run in Triton's interpreter: tests/__init__.py switches it on."""

import pytest
import torch

from rnnfast.backends import triton as backend


@pytest.fixture(scope="session")
def device() -> torch.device:
    """A GPU, or the CPU with the kernels interpreted."""
    reason = backend.why_not()
    if reason is not None:
        pytest.skip(reason)
    backend.load()
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
