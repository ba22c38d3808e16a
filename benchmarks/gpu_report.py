"""The JSON of benchmarks/gpu.py as a table to read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Report = dict[str, Any]


def outcomes_of_tests(file: Path) -> dict[str, str]:
    """What became of each test, from the file of benchmarks/gpu_pytest.py."""
    lines = file.read_text().splitlines() if file.exists() else []
    return dict(json.loads(line) for line in lines)


def readable(report: Report) -> str:
    """The measurements, a line each. What is not there yet is left out."""
    lines = [f"{report['card']}, driver {report['driver']}, torch {report['torch']}, commit {report['commit'][:10]}"]
    for part in ("build", "tests", "triton_tests", "sanitizer", "tune"):
        if part in report:
            lines.append(f"  {part}: {_verdict(report[part])}")
    for part, line in (("calibration", _calibration), ("goals", _goal), ("pipeline", _pipeline), ("grid", _layer)):
        lines += _rows(report, part, line)
    return "\n".join([*lines, *_rows(report, "triton_grid", _layer)])


def _verdict(result: Report) -> str:
    summary = result.get("summary", result.get("failure", ""))
    if "passed" not in result:
        return f"FAILED  {summary}" if "failure" in result else "done"
    verdict = {True: "passed  ", False: "FAILED  ", None: ""}[result["passed"]]
    return f"{verdict}{summary}"


def _rows(report: Report, part: str, line: Any) -> list[str]:
    rows = report.get(part, [])
    if isinstance(rows, dict):  # the part as a whole has failed
        return [f"  {part}: FAILED  {rows['failure']}"]
    return [f"  {_row(row, line)}" for row in rows]


def _row(row: Report, line: Any) -> str:
    if "left_out" in row:
        return f"{row['left_out']} measurements were left out for lack of time"
    if "failure" in row:
        what = " ".join(str(value) for value in row.values() if isinstance(value, (str, int)) and value is not False)
        return f"FAILED: {what}"
    return str(line(row))


def _calibration(row: Report) -> str:
    if "not_run" in row:
        return f"not run: {row['of']}, {row['not_run']}"
    ways = ", ".join(f"{way} {us:.2f}" for way, us in row["us"].items())
    return f"us a step of {row['of']}{' (' + row['layer'] + ')' if 'layer' in row else ''}: {ways}"


def _goal(row: Report) -> str:
    us, goals = row["us_a_step"], row["goals"]
    figures = ", ".join(f"{way} {us[way]:.2f} us (goal {goals[way]:.2f})" for way in us)
    return f"{row['cell']} 512 B=32 {row['compute_type']}: {figures}"


def _pipeline(row: Report) -> str:
    speed = f"{row['tokens_per_s']:12,.0f} tokens/s {row['characters_per_s']:12,.0f} characters/s"
    missed = [f"{what} is {share:.0%} of its goal" for what, share in row["of_goal"].items() if share < 1]
    return "  ".join([f"{row['cell']:8} {row['hidden']} {row['backend']:5} {speed}", *missed])


def _layer(row: Report) -> str:
    shape = f"{row['cell']:8} H={row['hidden']:<4} B={row['batch']:<3} T={row['steps']:<4} {row['compute_type']:8}"
    ratios = [
        f"{way} {row[way]['ratio']:6.2f}x of cuDNN{' (below its goal)' if row[way].get('of_goal', 1) < 1 else ''}"
        for way in ("forward", "both")
    ]
    return f"{shape} {row['kernel']:9} {'  '.join(ratios)}"
