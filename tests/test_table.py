"""The table of measurements that decides `auto` on a GPU: what it says, when it holds, and what happens without it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import rnnfast
from rnnfast import dispatch, table
from rnnfast.backends.triton import plan
from rnnfast.derivatives import needs_gradient
from rnnfast.dispatch import Request, Size
from rnnfast.table import Identity, Point, Regime, Table, compute_type_of
from rnnfast.tuning import arithmetic

CARD = Identity("NVIDIA H200", "580.65", "2.11.0+cu130", {"cuda": "abc", "triton": "def"})


def point(compute_type: str, hidden: int, batch: int, **times: dict[str, float]) -> Point:
    """A point of the LSTM, where each call took each backend so many microseconds."""
    calls = {name.replace("_", " "): values for name, values in times.items()}
    kernel = plan.plan("lstm", hidden, batch, 1, compute_type, plan.H100).kernel
    return Point("lstm", compute_type, hidden, batch, {"forward": ["cluster", 16, 8, 16]}, calls, kernel=kernel)


POINTS = [
    point(
        "float32",
        512,
        32,
        forward_1={"torch": 30, "cuda": 40},
        forward_16={"torch": 100, "cuda": 50, "triton": 70},
        forward_128={"torch": 800, "cuda": 500, "triton": 400},
        training_16={"torch": 300, "triton": 200},
    ),
    point("float32", 128, 32, forward_16={"torch": 40, "cuda": 20}),
    point("tf32", 512, 32, forward_16={"torch": 45}),
    point("tf32", 128, 32, forward_16={"torch": 30}),
]


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An H200 with nothing in its cache and nothing shipped."""
    monkeypatch.setenv("RNNFAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(table, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(table, "identity", lambda device: CARD)
    monkeypatch.setattr(plan, "card", lambda device: plan.H100)
    table.forget()
    with arithmetic("float32"):
        yield
    table.forget()


@pytest.fixture
def gpu_backends(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The two GPU backends as if they could run here; returns the names of those that are loaded, as they are."""
    loaded: list[str] = []
    monkeypatch.setattr(dispatch, "_loaded", set())

    def load(name: str) -> Callable[[], None]:
        return lambda: loaded.append(name)

    for name in table.TUNED:
        backend = dispatch.BACKENDS[name]
        faked = backend._replace(why_not=lambda: None, load=load(name), declines=lambda request: None)
        monkeypatch.setitem(dispatch.BACKENDS, name, faked)
    return loaded


def write(identity: Identity = CARD, path: Path | None = None, points: list[Point] = POINTS) -> Path:
    path = path or table.path_of(identity)
    Table(identity, points, "2026-11-26").write(path)
    return path


def request(hidden: int = 512, rows: int = 32, steps: int = 16, training: bool = False, ids: bool = False) -> Request:
    return Request("lstm", "cuda", torch.float32, ids, False, size=Size(0, hidden, rows, steps, training))


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = write()
    read = table.read(path)
    assert (read.identity, read.points, read.time) == (CARD, POINTS, "2026-11-26")
    assert list(path.parent.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o644
    found = table.of(0)
    assert found.table is not None
    assert found.table.points == POINTS


def test_the_nearest_point_is_at_or_above() -> None:
    measured = Table(CARD, POINTS)
    assert measured.nearest("lstm", "float32", 100, 20) is POINTS[1]
    assert measured.nearest("lstm", "float32", 129, 32) is POINTS[0]
    assert measured.nearest("lstm", "float32", 512, 33) is None
    assert measured.nearest("lstm", "bfloat16", 1, 1) is None
    assert measured.nearest("gru", "float32", 1, 1) is None
    tanh = Point("rnn_tanh", "float32", 8, 8)
    assert Table(CARD, [tanh]).nearest("rnn_relu", "float32", 8, 8) is tanh


@pytest.mark.parametrize(
    ("regime", "ranking"),
    [
        (Regime("lstm", "float32", "float32", 512, 32, 16, False), ("cuda", "triton", "torch")),
        (Regime("lstm", "float32", "float32", 512, 32, 1000, False), ("triton", "cuda", "torch")),
        (Regime("lstm", "float32", "float32", 512, 32, 15, False), ("torch", "cuda")),  # goes by one step
        (Regime("lstm", "float32", "float32", 512, 32, 16, True), ("triton", "torch")),
        (Regime("lstm", "float32", "float32", 512, 32, 15, True), ()),  # training was not measured so short
        (Regime("lstm", "float32", "tf32", 512, 32, 16, False), ("torch", "cuda", "triton")),  # cuDNN may use TF32
        (Regime("lstm", "float32", "float32", 513, 32, 16, False), ()),
    ],
)
def test_ranking(regime: Regime, ranking: tuple[str, ...]) -> None:
    assert Table(CARD, POINTS).ranking(regime) == ranking


def test_a_kernel_is_left_alone_where_another_one_was_measured() -> None:
    """At 512 units the Triton scan of 128 rows is another kernel than that of 32."""
    many = point("float32", 512, 128, forward_16={"torch": 100, "cuda": 50, "triton": 20})
    measured = Table(CARD, [many])
    assert many.kernel == "gates"
    for rows, ranking in ((128, ("triton", "cuda", "torch")), (32, ("cuda", "torch"))):
        regime = Regime("lstm", "float32", "float32", 512, rows, 16, False)
        assert measured.ranking(regime, device=0) == ranking
    # 128 rows in two directions are as many programs, 64 rows of 16 each for a direction.
    assert table._kernels("lstm", "float32", 512, 128, 0) == ["gates"]


@pytest.mark.parametrize("damage", [{"hidden": "512"}, {"batch": None}])
def test_a_size_that_is_no_number_is_damage(damage: dict[str, Any], tmp_path: Path) -> None:
    path = write(path=tmp_path / "table.json")
    content = json.loads(path.read_text())
    content["points"][0] |= damage
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="a size is no number"):
        table.read(path)


@pytest.mark.parametrize("newer", [False, True])
def test_each_of_torchs_settings_of_tf32_counts_for_its_own_part(newer: bool) -> None:
    """Set in either way; after the newer one, torch itself refuses to be asked in the older."""
    matmul, rnn = torch.backends.cuda.matmul, torch.backends.cudnn.rnn
    try:
        for ours, theirs in ((False, True), (True, False)):
            if newer:
                matmul.fp32_precision, rnn.fp32_precision = (
                    "tf32" if allowed else "ieee" for allowed in (ours, theirs)
                )
            else:
                matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = ours, theirs
            regime = Regime.of("lstm", torch.float32, 8, 1, 1, False)
            assert regime.compute_type == compute_type_of(torch.float32) == ("tf32" if ours else "float32")
            assert regime.torch_compute_type == ("tf32" if theirs else "float32")
            assert Regime.of("lstm", torch.bfloat16, 8, 1, 1, False)[1:3] == ("bfloat16", "bfloat16")
            assert newer is (_asked_in_the_older_way() == "refused")
    finally:
        matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, True  # as they are to begin with


def _asked_in_the_older_way() -> str:
    try:
        return str(torch.backends.cuda.matmul.allow_tf32 + torch.backends.cudnn.allow_tf32)
    except RuntimeError:
        return "refused"


def test_wins() -> None:
    assert Table(CARD, POINTS).wins("cuda") == (2, 7)
    assert Table(CARD, POINTS).wins("triton") == (2, 7)


# When a table holds


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: text.replace('"format": 1', '"format": 99'),
        lambda text: text.replace('"points": [', '"points": ["'),
        lambda text: text.replace('"cell"', '"sell"'),
        lambda text: text.replace("40", '"forty"', 1),
        lambda text: text.replace('["cluster", 16, 8, 16]', '["cluster", 16, 0, 16]'),
        lambda text: text.replace('["cluster", 16, 8, 16]', '["clusters", 16, 8, 16]'),
    ],
)
def test_a_damaged_table_is_named_and_left_alone(damage: Callable[[str], str]) -> None:
    path = write()
    path.write_text(damage(path.read_text()))
    found = table.of(0)
    assert found.table is None
    assert str(path) in found.why_not
    assert "cannot be read" in found.why_not


@pytest.mark.parametrize("other", [{"torch": "2.13.0"}, {"driver": "590.1"}, {"sources": {"cuda": "x", "triton": "y"}}])
def test_a_table_of_another_torch_driver_or_source_does_not_hold(other: dict[str, str]) -> None:
    write(CARD._replace(**other))
    found = table.of(0)
    assert found.table is None
    assert found.why_not == "its table is of another driver, torch or rnnfast"


def test_a_file_that_tells_of_another_card_does_not_hold() -> None:
    write(CARD._replace(card="NVIDIA A100"), table.path_of(CARD))
    assert "something else" in table.of(0).why_not


def test_a_shipped_table_holds_for_its_card_whatever_the_torch(tmp_path: Path) -> None:
    write(CARD._replace(torch="2.10.0", driver="1"), tmp_path / "shipped" / "h200.json")
    write(CARD._replace(card="NVIDIA A100"), tmp_path / "shipped" / "a100.json")
    found = table.of(0)
    assert found.table is not None
    assert (found.table.identity.card, found.table.origin) == (CARD.card, "shipped")


def test_of_a_shipped_table_what_belongs_to_other_kernels_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "shipped" / "h200.json"
    write(CARD._replace(sources={"cuda": "changed", "triton": "def"}), path)
    found = table.of(0)
    assert found.table is not None
    assert found.table.ranking(Regime("lstm", "float32", "float32", 512, 32, 16, False)) == ("triton", "torch")
    assert not any(p.teams for p in found.table.points)
    table.forget()
    write(CARD._replace(sources={"cuda": "changed", "triton": "too"}), path)
    assert table.of(0).table is None
    assert "other kernels" in table.of(0).why_not


def test_ones_own_table_comes_before_a_shipped_one(tmp_path: Path) -> None:
    write(path=tmp_path / "shipped" / "h200.json")
    own = write()
    assert table.of(0).table.origin == "this machine's own"
    own.write_text("{")
    table.forget()
    assert table.of(0).table.origin.startswith("shipped; ")
    assert str(own) in table.of(0).table.origin


def test_no_shipped_table_is_of_other_kernels_than_these() -> None:
    """None is shipped yet: no GPU has run the kernels."""
    present = table.sources()
    for path in (Path(table.__file__).parent / "tables").glob("*.json"):
        assert table.read(path).identity.sources == present, f"{path.name} must be measured again"


# What auto makes of it


def test_auto_takes_the_fastest_that_was_found_right(gpu_backends: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    write()
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
    choice = dispatch.choose(request())
    assert choice.backend == "cuda"
    assert choice.passed_over == (("triton", "the measurements of this card rank it slower"),)
    assert gpu_backends == ["cuda"]
    training = dispatch.choose(request(training=True))
    assert training.backend == "triton"
    assert training.passed_over == (("cuda", "the card's table has not found it right at this size"),)
    assert dispatch.choose(request(steps=1)).backend == "torch"
    assert dispatch.choose(request(hidden=2000)).backend == "torch"
    # torch.func cannot see into torch.nn; of what it can, a kernel that was slower than torch.nn is still the fastest.
    assert dispatch.choose(request(steps=1)._replace(transformed=True)).backend == "cuda"


def test_auto_follows_cudnns_own_setting_of_tf32(gpu_backends: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    write()
    torch.backends.cudnn.rnn.fp32_precision = "tf32"
    assert dispatch.choose(request()).backend == "torch"


@pytest.mark.parametrize("trained", ["weight_hh_l0", "bias_ih_l1", None])
def test_a_call_is_training_if_any_weight_needs_a_gradient(
    trained: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    monkeypatch.setattr(dispatch, "TABLED", ("cpu",))
    monkeypatch.setattr(dispatch, "size_of", lambda *size: seen.append(needs_gradient(size[-1])))
    layer = rnnfast.LSTM(3, 4, num_layers=2, backend="reference")
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name == trained)
    layer(torch.randn(5, 2, 3))
    layer.step(torch.randn(2, 3))
    assert seen == [trained is not None] * 2


def test_what_no_table_has_verified_is_left_alone(gpu_backends: list[str]) -> None:
    choice = dispatch.choose(request())
    assert choice.backend == "torch"
    assert gpu_backends == []
    assert [name for name, _ in choice.passed_over] == ["cuda", "triton"]
    for _, reason in choice.passed_over:
        assert "nothing has been measured on this NVIDIA H200" in reason
        assert "`rnnfast tune`" in reason


def test_a_backend_that_the_table_picks_and_that_fails_is_passed_over(
    gpu_backends: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write()
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
    broken = dispatch.BACKENDS["cuda"]._replace(why_not=lambda: "nvcc was not found")
    monkeypatch.setitem(dispatch.BACKENDS, "cuda", broken)
    choice = dispatch.choose(request())
    assert choice.backend == "triton"
    assert choice.passed_over == (("cuda", "nvcc was not found"),)


def test_the_backend_table_tells(gpu_backends: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    text = str(rnnfast.backends())
    assert text.count("not verified: nothing has been measured on this NVIDIA H200") == 2
    assert text.splitlines()[-1] == dispatch.HINT
    write()
    table.forget()
    statuses = {status.name: status for status in rnnfast.backends()}
    assert "fastest in 2 of 7 calls measured on NVIDIA H200" in statuses["cuda"].note
    assert statuses["cuda"].picked_on == ("cuda, where fastest",)
    assert dispatch.HINT not in str(rnnfast.backends())


def test_the_size_of_a_call() -> None:
    weight = torch.zeros(4 * 7, 7, requires_grad=True, device="meta")
    assert dispatch.size_of("lstm", weight, 6, 5, (weight,)) == Size(0, 7, 6, 5, True)
    with torch.no_grad():
        assert not dispatch.size_of("lstm", weight, 6, 5, (weight,)).training
    assert not dispatch.size_of("lstm", weight.detach(), 6, 5, (None, weight.detach())).training
    on_another_card: Any = SimpleNamespace(device=torch.device("cuda:1"), shape=weight.shape)
    assert dispatch.size_of("lstm", on_another_card, 6, 5, ()) == Size(1, 7, 6, 5, False)


def test_explain_measures_a_call_as_the_call_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stand-in for a GPU: the sizes that explain() finds are those that the layer finds."""
    sizes: list[object] = []
    original = dispatch.size_of

    def record(cell: str, w_hh: torch.Tensor, rows: int, steps: int, differentiable: object) -> Size:
        sizes.append((cell, rows, steps))
        return original(cell, w_hh, rows, steps, differentiable)

    monkeypatch.setattr(dispatch, "size_of", record)
    monkeypatch.setattr(dispatch, "TABLED", ("cpu",))
    packed = torch.nn.utils.rnn.pack_padded_sequence(torch.randn(5, 3, 4), torch.tensor([5, 3, 1]))
    for options, input, expected in (
        ({}, torch.randn(5, 3, 4), (3, 5)),
        ({"batch_first": True}, torch.randn(5, 3, 4), (5, 3)),
        ({"bidirectional": True}, torch.randn(5, 3, 4), (6, 5)),
        ({}, torch.randn(5, 4), (1, 5)),
        ({"batch_first": True}, torch.randint(4, (5, 3)), (5, 3)),
        ({}, torch.randint(4, (5,)), (1, 5)),
        ({}, packed, (3, 5)),
        ({"bidirectional": True}, packed, (6, 5)),
    ):
        layer = rnnfast.GRU(4, 6, **options)
        sizes.clear()
        with rnnfast.use_backend("reference"):
            rnnfast.explain(layer, input)
            layer(input)
        assert sizes == [("gru", *expected)] * 2
    sizes.clear()
    with rnnfast.use_backend("reference"):
        rnnfast.GRU(4, 6).step(torch.randn(3, 4))
    assert sizes == [("gru", 3, 1)]


def test_explain_chooses_as_the_call_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stand-in for a GPU, whose table ranks the reference first: cells do not ask it."""
    order = dispatch._order
    monkeypatch.setattr(dispatch, "TABLED", ("cpu",))
    monkeypatch.setattr(dispatch, "_order", lambda r: order(r) if r.size is None else (("reference",), ""))
    chosen, choose = [], dispatch.choose

    def record(request: Request, backend: str = "auto") -> dispatch.Choice:
        choice = choose(request, backend)
        if backend == "auto":
            chosen.append(choice.backend)
        return choice

    monkeypatch.setattr(dispatch, "choose", record)
    sequence = torch.randn(5, 3, 4)
    for layer, input, expected in (
        (rnnfast.GRU(4, 6), sequence, "reference"),
        (rnnfast.GRUCell(4, 6), sequence[0], "cpu"),
        (rnnfast.GRUCell(4, 6), torch.tensor([1, 2]), "cpu"),
        (rnnfast.Stack("gru", 4, [6]), sequence, "reference"),
        (rnnfast.Stack("gru", 4, [6], zoneout=0.5), sequence, "cpu"),
    ):
        chosen.clear()
        assert rnnfast.explain(layer, input).backend == expected
        layer(input)
        assert set(chosen) == {expected}


def test_a_compiled_graph_looks_it_up_too(gpu_backends: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    write()
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
    chosen, w_hh = [], torch.empty(4 * 512, 512)

    def call(x: torch.Tensor) -> torch.Tensor:
        size = tuple(dispatch.size_of("lstm", w_hh, len(x), 16, ()))
        name = dispatch.choose_name("auto", size, "lstm", "cuda", torch.float32, False, False)
        chosen.append(name)
        return x + len(name)

    compiled = torch.compile(call, fullgraph=True, backend="eager", dynamic=False)
    for rows in (32, 8, 9, 100):
        assert torch.equal(compiled(torch.zeros(rows)), call(torch.zeros(rows)))
    assert chosen[-1] == "torch"


def test_an_exported_graph_is_not_bound_to_the_sizes_of_its_example(gpu_backends: list[str]) -> None:
    write()
    torch.backends.cudnn.rnn.fp32_precision = "ieee"

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w_hh = torch.nn.Parameter(torch.zeros(4 * 512, 512))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            size = dispatch.size_of("lstm", self.w_hh, x.shape[1], x.shape[0], (x,))
            return x + len(dispatch.choose(Request("lstm", "cuda", torch.float32, False, False, size=size)).backend)

    example, other = torch.zeros(16, 32), torch.zeros(7, 50)
    assert torch.equal(Layer()(example), example + len("cuda"))
    dispatch.choose(request(steps=1))  # loads torch's own path, which is no part of what is exported
    anything = {0: torch.export.Dim("steps"), 1: torch.export.Dim("rows")}
    exported = torch.export.export(Layer(), (example,), dynamic_shapes={"x": anything}, strict=True)
    assert torch.equal(exported.module()(other), other + len("torch"))
