"""The accuracy of the kernels' tanh and sigmoid, and what a machine without Triton or a GPU is told."""

import os
import subprocess
import sys

import pytest
import torch

from rnnfast.backends import triton as backend
from rnnfast.dispatch import Request


def _evaluate(device: torch.device, name: str, x: torch.Tensor) -> torch.Tensor:
    import triton

    from . import kernels

    y = torch.empty_like(x, device=device)
    kernels.evaluate[(triton.cdiv(x.numel(), 1024),)](
        x.to(device), y, x.numel(), FUNCTION=getattr(kernels, name), BLOCK=1024, enable_fp_fusion=True
    )
    return y.cpu()


@pytest.mark.parametrize("name", ["tanh", "sigmoid"])
def test_accuracy(device, name):
    """From the smallest values (relative accuracy near 0) to saturation, tanh is within 4 ulp of float64.

    A GPU's exp(x) is a power of 2 whose exponent, x log2(e), is rounded to float32, as log2(e) itself is: that makes
    exp(x) off by up to 1.25 |x| ulp. sigmoid is exp(x) for x << 0; in tanh it disappears beside 1. That power of 2,
    1 + exp and the quotient make up to 8 ulp. A GPU's power of 2 is 0 where it is subnormal, and sigmoid with it.
    """
    magnitude = torch.cat(
        (torch.logspace(-37, 2, 4000), torch.linspace(0.3, 10, 4000), torch.linspace(44.3, 44.8, 4000))
    )
    x = torch.cat((magnitude, -magnitude))
    truth = getattr(torch, name)(x.double())
    rounded = truth.abs().float()
    ulp = (torch.nextafter(rounded, torch.tensor(torch.inf)) - rounded).double()
    error = (_evaluate(device, name, x).double() - truth).abs()
    bound = 8 + 1.25 * x.abs() if name == "sigmoid" else 4
    subnormal = truth.abs() < torch.finfo(x.dtype).tiny
    assert (error <= torch.where(subnormal, truth.abs(), bound * ulp)).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, from the branch not taken
@pytest.mark.parametrize("name", ["tanh", "sigmoid"])
def test_special_values(device, name):
    x = torch.tensor([0.0, float("inf"), -float("inf"), float("nan")])
    torch.testing.assert_close(_evaluate(device, name, x), getattr(torch, name)(x), equal_nan=True, rtol=0, atol=0)


def test_opaque_changes_nothing(device):
    x = torch.randn(100)
    assert torch.equal(_evaluate(device, "opaque", x), x)


@pytest.mark.parametrize("side", ["in the kernel", "of the weights"])
def test_rounding_to_tf32(device, side):
    """To the nearer multiple of the tenth bit's value, ties away from zero, as NVIDIA's own conversion rounds."""
    magnitude = torch.cat((torch.logspace(-37, 37, 1000), 1 + torch.arange(64) * 2.0**-13, torch.tensor([0.0])))
    x = torch.cat((magnitude, -magnitude))
    significand, exponent = torch.frexp(x.double())
    units = significand * 2**11
    truth = torch.ldexp(torch.copysign((units.abs() + 0.5).floor(), units), exponent - 11).float()
    special = torch.tensor([float("inf"), -float("inf")])
    nan = torch.tensor([0x7FFFFFFF, 0x7FC00000, -1], dtype=torch.int32).view(torch.float32)

    def rounded(x):
        if side == "in the kernel":
            return _evaluate(device, "round_to_tf32", x)
        from rnnfast.backends.triton import launch

        return launch._rounded_to_tf32(x)

    assert torch.equal(rounded(x), truth)
    assert torch.equal(rounded(special), special)
    assert rounded(nan).isnan().all()


def test_import_imports_no_triton():
    code = (
        "import sys, rnnfast; from rnnfast.backends import triton as b; b.why_not(); assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_why_not(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(os.environ, "TRITON_INTERPRET", "0")
    assert "no CUDA or ROCm device" in str(backend.why_not())
    on_cpu = Request("gru", "cpu", torch.float32, False, False)
    assert "runs on a GPU" in str(backend.declines(on_cpu))
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    assert "not installed" in str(backend.why_not())
