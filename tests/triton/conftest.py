"""Without a GPU the kernels run in Triton's interpreter: tests/__init__.py switches it on."""

import dataclasses

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
    if torch.cuda.is_available():
        return torch.device("cuda")
    from triton.runtime.interpreter import interpreter_builder

    # It computes whether sums of integers overflow, and without `debug` looks at none of that: a third of its time.
    interpreter_builder.options = dataclasses.replace(interpreter_builder.options, sanitize_overflow=False)
    return torch.device("cpu")
