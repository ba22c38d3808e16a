"""A pytest plugin: the tests of a GPU run so that one that breaks the device, hangs or crashes costs no other.

What became of each test ("passed", "skipped", "failed: why", "did not end") is a line of the JSON-lines file
$RNNFAST_GPU_TESTS, from its start on. A test that is in the file is not run again, so that another process goes on
behind the one that ended this.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_report import outcomes_of_tests

SECONDS_A_TEST = 40  # then the process is killed: one that waits for a kernel hears nothing else
BROKEN = 99  # the exit status where a test has broken the device
RESULTS = Path(os.environ["RNNFAST_GPU_TESTS"])


def _write(test: str, outcome: str) -> None:
    with RESULTS.open("a") as file:
        file.write(json.dumps([test, outcome]) + "\n")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    known = outcomes_of_tests(RESULTS)
    items[:] = [item for item in items if item.nodeid not in known]


def pytest_runtest_logstart(nodeid: str) -> None:
    _write(nodeid, "did not end")
    signal.alarm(SECONDS_A_TEST)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        said = report.capstdout + report.capstderr  # a kernel's own words among it
        _write(report.nodeid, f"failed: {report.longreprtext[-1500:]}\n{said[:500]}")
        try:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        except RuntimeError:
            pytest.exit("this test has broken the device", returncode=BROKEN)
    elif report.when == "call" or report.skipped:
        _write(report.nodeid, report.outcome)


def pytest_runtest_logfinish() -> None:
    signal.alarm(0)
