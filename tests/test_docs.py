"""What the pages say holds: examples run as they stand, figures are those of the result files, links lead somewhere.

The code of a page, block after block, is one program. `python -m tests.test_docs` writes the tables of figures in
README.md and docs/benchmarks.md, from benchmarks/results, and docs/api.md, from the docstrings.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import math
import re
import runpy
from collections.abc import Iterable
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import pytest
import torch

import rnnfast

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md")])


# ---- examples -------------------------------------------------------------------------------------------------------


def run_page(page: str, kind: str = "python", **names: Any) -> dict[str, Any]:
    """Runs every block of a kind on a page, one after the other, and returns their names."""
    text = (DOCS / page).read_text()
    blocks = list(re.finditer(rf"^```{kind}\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    assert blocks
    names["__name__"] = page
    for block in blocks:
        line = text[: block.start(1)].count("\n")
        exec(compile("\n" * line + block[1], str(DOCS / page), "exec"), names)
    return names


@pytest.mark.parametrize("page", ["install.md", "sequences.md", "modules.md", "regularisation.md"])
def test_examples_run(page: str) -> None:
    run_page(page)


def test_the_swap_of_the_readme_runs() -> None:
    names = run_page("../README.md")
    assert names["output"].shape == (35, 8, 256)


def test_the_example_of_episodes_learns(capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_rng_state()
    runpy.run_path(str(ROOT / "examples" / "episodes.py"))
    torch.set_rng_state(before)
    (right,) = re.findall(r"([\d.]+) of the answers are right\n$", capsys.readouterr().out)
    assert float(right) > 0.9


def test_the_example_of_the_pipeline_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rnnfast import lm

    def config(**settings: Any) -> Any:
        return Config(**(settings | {"corpus": "pydoc", "max_tokens": 1500, "hidden_size": 16, "epochs": 1}))

    Config = lm.TrainConfig
    monkeypatch.setattr(lm, "TrainConfig", config)
    monkeypatch.chdir(tmp_path)
    run_page("pipeline.md")
    assert (tmp_path / "runs/gru/checkpoint.safetensors").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_examples_of_transforms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_page("transforms.md")
    torch._dynamo.reset()
    assert names["layer"].weight_hh_l0.grad is not None


SIZES = {0: torch.export.Dim("steps", min=1, max=4096), 1: torch.export.Dim("batch", min=1, max=512)}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_example_of_aot_inductor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    layer = rnnfast.LSTM(5, 7)
    with torch.no_grad():
        program = torch.export.export(layer, (torch.randn(20, 4, 5),), dynamic_shapes=(SIZES,))
        run_page("transforms.md", "python aoti", torch=torch, layer=layer, program=program)
    assert (tmp_path / "layer.pt2").exists()


@pytest.mark.filterwarnings("ignore")  # torch's exporter deprecates itself
def test_example_of_onnx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript", reason="needs onnxscript: pip install 'rnnfast[onnx]'")
    monkeypatch.chdir(tmp_path)
    run_page("transforms.md", "python onnx", torch=torch, layer=rnnfast.LSTM(5, 7), sizes=SIZES)
    assert (tmp_path / "layer.onnx").exists()


# ---- figures --------------------------------------------------------------------------------------------------------

RESULTS = ROOT / "benchmarks" / "results"
MACHINES = {
    "amd-epyc-zen5": "AMD EPYC Zen 5",
    "intel-xeon": "Intel Xeon with AMX",
    "amd-epyc": "AMD EPYC with AVX-512",
    "amd-epyc-avx2": "AMD EPYC with AVX2",
}
NEWER = [name for name in MACHINES if name != "amd-epyc"]  # than the first results, which are of an older rnnfast
BEGIN, END = "<!-- begin: written by python -m tests.test_docs -->\n", "<!-- end -->\n"
CHAPTER, WITHOUT_GRADIENTS = "the chapter's loop", "the chapter's loop without gradients"


class Quote(NamedTuple):
    """A row of a table: what of a benchmark it quotes.

    `name`: the benchmark, which is also its file's name. `what`: its first column. `of`: what the ratios are to; "best"
    for the better of several libraries, or "peak" and "limit" for the shares of those. `by`: the mean of each kind of
    case is quoted, too, by these fields of the case. `at_limit`: the ratios as they would be with rnnfast at its limit.
    """

    name: str
    what: str
    of: str
    by: tuple[str, ...] = ()
    at_limit: bool = False


IN_DETAIL = (
    Quote("layers", "forward+backward, against torch.nn", "torch.nn", ("cell",)),
    Quote("layers", "the same, were rnnfast at the limit", "torch.nn", ("cell",), at_limit=True),
    Quote("peers", "forward+backward, against torch.nn", "torch.nn"),
    Quote("peers", "forward+backward, against the better of torch.nn and JAX", "best"),
    Quote("peers", "the same, were rnnfast at the limit", "best", at_limit=True),
    Quote("peers-forward", "forward, against the best of torch.nn, ONNX Runtime and JAX", "best"),
    Quote("peers-forward", "the same, were rnnfast at the limit", "best", at_limit=True),
    Quote("packed", "ragged PackedSequence, forward+backward, against torch.nn", "torch.nn"),
    Quote("loop", "a loop of cells, forward+backward, against torch.nn's", "torch.nn", ("cell",)),
    Quote("stream", "a step, against torch.nn", "torch.nn", ("cell",)),
    Quote("stream", "a step, against ONNX Runtime", "onnxruntime"),
    Quote("stream", "a step, against ONNX Runtime that keeps the state, too", "onnxruntime, bound"),
    Quote("stream", "a step, against `layer.step`", "layer.step"),
    Quote("memory", "torch.nn's peak over rnnfast's", "torch.nn"),
    Quote("bfloat16", "forward+backward, against rnnfast's float32", "our float32"),
    Quote("training", "against the chapter's loop", CHAPTER, ("cell", "hidden_size")),
    Quote("training", "the same, were rnnfast at the limit", CHAPTER, ("cell", "hidden_size"), at_limit=True),
    Quote("training-bfloat16", "RNN 512, against the chapter's float32 loop", CHAPTER, ("dtype",)),
    Quote("generation", "greedy, against the chapter's loop", CHAPTER, ("cell", "hidden_size")),
    Quote("generation", "the same, were rnnfast at the limit", CHAPTER, ("cell", "hidden_size"), at_limit=True),
    Quote("generation", "greedy, against the chapter's loop without gradients", WITHOUT_GRADIENTS),
    Quote("scan", "share of the FMA peak", "peak", ("direction",)),
    Quote("scan", "share of the limit", "limit", ("direction",)),
)
AT_A_GLANCE = (
    Quote("layers", "a layer, forward and backward, against torch.nn", "torch.nn", ("cell",)),
    Quote("peers", "the same against the better of torch.nn and JAX, B 1 and 32", "best"),
    Quote("packed", "a ragged PackedSequence, forward and backward, against torch.nn", "torch.nn"),
    Quote("stream", "one step of a stream, against torch.nn", "torch.nn"),
    Quote("stream", "one step of a stream, against ONNX Runtime", "onnxruntime"),
    Quote("stream", "the same where ONNX Runtime keeps the state, too", "onnxruntime, bound"),
    Quote("generation", "greedy text, against the loop of the book Dive into Deep Learning (d2l)", CHAPTER),
    Quote("generation", "the same against that loop without gradients", WITHOUT_GRADIENTS),
)
NAMES = {"rnn": "RNN", "lstm": "LSTM", "gru": "GRU", "onnxruntime": "ONNX Runtime", "jax": "JAX"}


@functools.cache
def read(machine: str, name: str) -> Any:
    return json.loads((RESULTS / machine / f"{name}.json").read_text())


def in_detail(machine: str) -> list[Quote]:
    """What has been measured there."""
    return [quote for quote in IN_DETAIL if is_measured(machine, quote)]


def is_measured(machine: str, quote: Quote) -> bool:
    if not (RESULTS / machine / f"{quote.name}.json").exists():
        return False
    rows = read(machine, quote.name)["benchmarks"][quote.name]["rows"]
    # Bound by reading weights, which older files leave out of the limit.
    if quote.name == "generation" and quote.at_limit and not rows[0].get("weights_gb_s"):
        return False
    return quote.of in ("best", "peak", "limit") or quote.of in ratios(quote, rows[0])


def ratios(quote: Quote, row: Any) -> dict[str, float]:
    found: dict[str, float] = row["ratios_at_limit" if quote.at_limit else "ratios"]
    return found


def value(quote: Quote, row: Any) -> float:
    if quote.of in ("peak", "limit"):
        found = row["share_of_fma_peak" if quote.of == "peak" else "share_of_limit"]
    else:
        found = min(ratios(quote, row).values()) if quote.of == "best" else ratios(quote, row)[quote.of]
    return float(found)


def mean(values: list[float]) -> float:
    return math.exp(math.fsum(map(math.log, values)) / len(values))


def shown(quote: Quote, number: float) -> str:
    if quote.of in ("peak", "limit"):
        return f"{number:.0%}"
    return f"{number:.1f}x" if number >= 5 else f"{number:.2f}x"


def place(quote: Quote, row: Any) -> str:
    """Which case a row is, in a few words, and against whom."""
    case = row["case"]
    words = [NAMES[case["cell"]], f"{case['hidden_size']} units"]
    if case.get("steps", 1) > 1:
        words += [f"B={case['batch']}", f"T={case['steps']}"]
    if case["dtype"] != "float32":
        words.append(case["dtype"])
    if quote.name == "scan":
        words.append(case["direction"])
    if quote.of == "best":
        words.append(
            "against "
            + (lambda peer: NAMES.get(peer, peer))(min(found := ratios(quote, row), key=lambda peer: found[peer]))
        )
    return ", ".join(words)


def cells(machine: str, quote: Quote) -> tuple[str, str, str]:
    """The mean, the worst case and the count of those below 1x, computed from the rows of the file."""
    rows = read(machine, quote.name)["benchmarks"][quote.name]["rows"]
    by_kind: dict[str, list[float]] = {}
    for row in rows:
        kind = " ".join(NAMES.get(str(row["case"][key]), str(row["case"][key])) for key in quote.by)
        by_kind.setdefault(kind, []).append(value(quote, row))
    values = [value(quote, row) for row in rows]
    worst = min(rows, key=lambda row: value(quote, row))
    kinds = ", ".join(f"{kind} {shown(quote, mean(found))}" for kind, found in by_kind.items())
    average = shown(quote, mean(values)) + (f" ({kinds})" if quote.by else "")
    slower = (
        ""
        if quote.at_limit or quote.of in ("peak", "limit")
        else f"{sum(number < 1 for number in values)} of {len(values)}"
    )
    # A single limit is found in the seconds of its case, with their noise.
    bottom = "" if quote.at_limit else f"{shown(quote, value(quote, worst))} ({place(quote, worst)})"
    return average, bottom, slower


def table(header: str, rows: Iterable[Iterable[str]]) -> str:
    lines = (" | ".join(row) for row in rows)
    return f"{header}\n{'|---' * (header.count('|') - 1)}|\n" + "".join(f"| {line} |\n" for line in lines)


def detailed() -> str:
    """What docs/benchmarks.md quotes."""
    return "\n".join(map(of_machine, MACHINES))


def of_machine(name: str) -> str:
    machine = read(name, "layers")["machine"]
    peaks = [
        row["fma_peak_gflops"]
        for quote in in_detail(name)
        for row in read(name, quote.name)["benchmarks"][quote.name]["rows"]
        if row["fma_peak_gflops"]
    ]
    torch_version = machine["torch"].split("+")[0]
    text = (
        f"{machine['cpu'].replace('(R)', '')}, {machine['cores']} virtual cores, {machine['torch_threads']} threads, "
    )
    text += f"torch {torch_version}; FMA peak {min(peaks):.0f} to {max(peaks):.0f} GFLOP/s.\n\n"
    rows = ((f"`{quote.name}`: {quote.what}", *cells(name, quote)) for quote in in_detail(name))
    return f"**{MACHINES[name]}.** {text}" + table("| | geometric mean | worst | points below 1x |", rows)


def at_a_glance() -> str:
    """What README.md quotes."""
    header = "| | " + " | worst | ".join(MACHINES[name] for name in NEWER) + " | worst |"

    def measured(machine: str, quote: Quote) -> tuple[str, ...]:
        if not is_measured(machine, quote):
            return "not measured", ""
        average, bottom, _ = cells(machine, quote)
        return average, bottom.partition(" (")[0]

    return table(header, ((q.what, *(c for m in NEWER for c in measured(m, q))) for q in AT_A_GLANCE))


MODULES = tuple(
    f"rnnfast{module}" for module in ("", ".functional", ".sequences", ".regularisation", ".onnx", ".lm", ".d2l")
)


def public_names() -> str:
    """What docs/api.md lists: every public name and method with the first sentences of its docstring."""
    return "\n".join(map(names_of, MODULES))


def names_of(module: str) -> str:
    found = importlib.import_module(module)
    rows = []
    for name in found.__all__:
        member = getattr(found, name)
        if inspect.ismodule(member):
            continue  # it has a table of its own
        rows.append((f"`{name}`", summary(member)))
        if isinstance(member, type) and not issubclass(member, Exception):
            rows += [(f"`{name}.{method}`", summary(getattr(member, method))) for method in public_methods(member)]
    return f"## {module}\n\n{summary(found)}\n\n" + table("| | |", rows)


def public_methods(kind: type) -> list[str]:
    """Those that have a docstring, of the class and of bases that are ours, and properties."""
    ours = [vars(base) for base in kind.__mro__ if base.__module__.startswith("rnnfast")]
    kinds = (FunctionType, classmethod, property)
    names = {name for members in ours for name, value in members.items() if isinstance(value, kinds) and value.__doc__}
    return sorted(name for name in names if not name.startswith("_"))


def summary(member: Any) -> str:
    first, *_ = (inspect.getdoc(member) or "").split("\n\n")
    assert first, f"{member} has no docstring"
    return " ".join(first.split()).replace("|", "\\|")


TABLES = {ROOT / "README.md": at_a_glance, DOCS / "benchmarks.md": detailed, DOCS / "api.md": public_names}


@pytest.mark.parametrize("page", [pytest.param(page, id=page.name) for page in TABLES])
def test_tables_are_as_they_are_written(page: Path) -> None:
    _, rest = page.read_text().split(BEGIN)
    found, expected = rest.split(END)[0].splitlines(), TABLES[page]().splitlines()
    for written, right in zip(found, expected, strict=False):
        assert written == right, f"{page.name} has\n{written}\nin place of\n{right}\n{HINT}"
    assert len(found) == len(expected), f"{page.name}: a row is missing or too many; {HINT}"


HINT = "`python -m tests.test_docs` writes the tables of README.md, docs/benchmarks.md and docs/api.md"


@pytest.mark.parametrize(
    ("machine", "quote"),
    [pytest.param(m, q, id=f"{m}-{q.name}-{q.of}-{q.at_limit}") for m in MACHINES for q in in_detail(m)],
)
def test_the_summaries_are_those_of_the_rows(machine: str, quote: Quote) -> None:
    of = {"best": "ratio to the best peer", "peak": "share of FMA peak", "limit": "share of limit"}
    benchmark = read(machine, quote.name)["benchmarks"][quote.name]
    name = of.get(quote.of, f"ratio to {quote.of}") + (", ours at the limit" if quote.at_limit else "")
    summary = benchmark["summary"][name]
    values = [value(quote, row) for row in benchmark["rows"]]
    assert summary["geometric_mean"] == pytest.approx(mean(values))
    assert summary["worst"] == pytest.approx(min(values))


def test_everything_quoted_has_been_measured() -> None:
    first = next(iter(MACHINES))
    assert in_detail(first) == list(IN_DETAIL)
    assert all(is_measured(first, quote) for quote in AT_A_GLANCE)


def test_no_other_figure_is_quoted_as_a_ratio() -> None:
    """Outside the tables the pages have no figure like 2.74x, which nothing would hold against a file."""
    for page in TABLES:
        before, rest = page.read_text().split(BEGIN)
        found = re.findall(r"\b\d+\.\d+x\b", before + rest.split(END)[1])
        assert not found, f"{page.name} quotes {', '.join(found)} outside the tables that are held against files"


# ---- links ----------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Those of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_no_name_of_the_package_is_there_by_accident() -> None:
    for name in dir(rnnfast):
        if not name.startswith("_") and name not in rnnfast.__all__:
            assert isinstance(getattr(rnnfast, name), ModuleType), name


def test_the_names_of_d2l_are_told() -> None:
    told = set(re.findall(r"`(\w+)`", (DOCS / "pipeline.md").read_text()))
    assert set(importlib.import_module("rnnfast.d2l").__all__) <= told


@pytest.mark.parametrize("page", [pytest.param(page, id=page.name) for page in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        assert "://" not in link, f"{page.name} links to {link}, which no test can follow"
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name} links to {link}: there is no such file"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}: there is no such heading"


if __name__ == "__main__":
    for page, quoted in TABLES.items():
        before, rest = page.read_text().split(BEGIN)
        page.write_text(before + BEGIN + quoted() + END + rest.split(END)[1])
        print(quoted())
