"""The scan alone: one call of the operator, without an input product (token ids) and without weight gradients."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from rnnfast import dispatch
from rnnfast.bench.measure import TOLERANCE, Work, alternate_with_limits, check_same, timed
from rnnfast.bench.report import OURS, Row
from rnnfast.cells import Cell, cell_named
from rnnfast.errors import UserError

VOCABULARY = 28
FORWARD_RESULTS = ("output", "h_n", "c_n", "tape")
BACKWARD_RESULTS = ("d_input", "d_w_ih", "d_w_hh", "d_b_ih", "d_b_hh", "d_w_hr", "d_h_0", "d_c_0")


@dataclass(frozen=True)
class ScanCase:
    """One scan. `direction`: "forward" (as in training, the tape is written) or "backward" (of the states)."""

    cell: str
    hidden_size: int
    batch: int
    steps: int
    direction: str
    dtype: str = "float32"

    @property
    def label(self) -> str:
        extra = f" {self.dtype}" if self.dtype != "float32" else ""
        return f"{self.cell} H={self.hidden_size} B={self.batch} T={self.steps} scan {self.direction}{extra}"

    @property
    def work(self) -> Work:
        """The recurrent product, 2 B H G H a step; backward its transpose, as many."""
        units = float(self.steps * self.batch * self.hidden_size)
        gate_math = (units, 0.0) if self.direction == "forward" else (0.0, units)
        weights = self._cell.gates * self.hidden_size**2
        flops = 2.0 * self.steps * self.batch * weights
        return Work(self.cell, self.batch, self.hidden_size, flops, 4 * weights, self.steps, 0.0, 0.0, *gate_math)

    @property
    def _cell(self) -> Cell:
        return cell_named(self.cell)

    def arguments(self) -> list[Any]:
        """Those of the forward operator but for `save_tape`: one lane, token ids."""
        generator = torch.Generator().manual_seed(0)
        dtype = getattr(torch, self.dtype)
        gate_rows, bound = self._cell.gates * self.hidden_size, self.hidden_size**-0.5

        def uniform(*shape: int) -> Tensor:
            return torch.empty(shape).uniform_(-bound, bound, generator=generator).to(dtype)

        weights = (uniform(1, gate_rows, n) for n in (VOCABULARY, self.hidden_size))
        biases = (uniform(1, gate_rows) for _ in range(2))
        states = (uniform(1, self.batch, self.hidden_size) for _ in range(2))
        h_0, c_0 = states
        ids = torch.randint(VOCABULARY, (self.steps * self.batch,), generator=generator)
        return [ids, *weights, *biases, None, h_0, c_0 if self.cell == "lstm" else None, None, self._cell.name, False]


def measure_scan(case: ScanCase, seconds: float, backend: str = "auto") -> Row:
    """The operator of one backend (auto: the compiled one), after a comparison with the reference's.

    Raises:
        UserError: that backend is not available.
        Disagreement: it does not compute what the reference does.
    """
    backend = "cpu" if backend == dispatch.AUTO else backend
    dtype = getattr(torch, case.dtype)
    arguments = case.arguments()
    try:
        dispatch.choose(dispatch.Request(arguments[-2], "cpu", dtype, True, False), backend)
        forward = getattr(torch.ops.rnnfast, f"scan_{backend}").default
        backward = getattr(torch.ops.rnnfast, f"scan_{backend}_backward").default
    except (ValueError, RuntimeError, AttributeError) as error:
        raise UserError(f"the scan of backend '{backend}' cannot be timed: {error}") from error
    truth = torch.ops.rnnfast.scan_reference.default(*arguments, True)
    rows = torch.randn(truth[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    backward_arguments = (rows, None, None, *arguments, truth[0], truth[3], False, False)

    def run() -> Any:
        return forward(*arguments, True) if case.direction == "forward" else backward(*backward_arguments)

    names: tuple[str, ...] = FORWARD_RESULTS
    if case.direction != "forward":
        names, truth = BACKWARD_RESULTS, torch.ops.rnnfast.scan_reference_backward.default(*backward_arguments)
    with torch.no_grad():
        results = (dict(zip(names, tensors, strict=True)) for tensors in (run(), truth))
        check_same(backend, next(results), next(results), TOLERANCE[dtype], case.label)
        work = case.work if dtype is torch.float32 else None
        samples, limits = alternate_with_limits({OURS: timed(run)}, seconds, work=work)
    return Row(case.label, asdict(case), backend, samples, flops=case.work.flops, limits=limits)
