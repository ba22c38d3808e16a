"""The launch plan for cards that are not here: what runs where, and that what is planned can run."""

from __future__ import annotations

import itertools

import pytest
import torch

from rnnfast.backends.cuda.launch import Plan, _parse
from rnnfast.cells import CELLS

from .conftest import EMULATED
from .layers import DTYPES

# Compute capability, multiprocessors, shared memory a block, clusters of 2, 4, 8 and 16 blocks at once. The counts of
# clusters are estimates (a cluster lies within a group of 16 or 18 multiprocessors); on a device they are asked for.
CARDS = {
    "H200": [90, 132, 232448, 66, 32, 16, 7],
    "H100 PCIe": [90, 114, 232448, 57, 28, 14, 6],
    "A100": [80, 108, 166912, 0, 0, 0, 0],
    "RTX 4060": [89, 24, 101376, 0, 0, 0, 0],
}
HIDDEN = (1, 31, 128, 256, 512, 1000, 2048)
BATCH = (1, 7, 32, 100, 512)


@pytest.fixture
def plan(emulated):
    ops = getattr(torch.ops, EMULATED)

    def make(card: str, cell: str, hidden: int, batch: int, compute_type: str, backward: bool = False) -> Plan:
        problem = (cell, hidden, batch, 1, compute_type, backward, CARDS[card])
        plans = _parse(ops.plans(*problem))
        for made in plans:
            assert made.kernel == "steps" or ops.check(*problem, made.team) == ""
        assert [p.nanoseconds for p in plans] == sorted(p.nanoseconds for p in plans)
        assert len({(p.kernel, p.kernel == "cluster" and p.blocks) for p in plans}) == len(plans)
        return plans[0]

    return make


@pytest.mark.parametrize("card", CARDS)
def test_what_is_planned_can_run(plan, card):
    for cell, hidden, batch, compute_type, backward in itertools.product(CELLS, HIDDEN, BATCH, DTYPES, (False, True)):
        made = plan(card, cell, hidden, batch, compute_type, backward)
        capability, multiprocessors, shared_bytes, *_ = CARDS[card]
        assert made.shared_bytes <= shared_bytes
        if made.kernel == "cluster":
            assert capability >= 90
            assert compute_type != "float64"
            assert made.blocks in (2, 4, 8, 16)
        elif made.kernel == "grid":
            assert made.blocks * -(-batch // made.rows) <= multiprocessors
        elif made.kernel == "block":
            assert made.blocks == 1


def test_small_layers_stay_in_a_block(plan):
    for card, cell in itertools.product(CARDS, CELLS):
        assert plan(card, cell, 32, 32, "float32").kernel == "block"


@pytest.mark.parametrize("card", ["H200", "H100 PCIe"])
@pytest.mark.parametrize(
    ("cell", "compute_type", "backward"),
    [
        ("lstm", "bfloat16", False),
        ("lstm", "bfloat16", True),
        ("lstm", "tf32", False),
        ("lstm", "tf32", True),
        ("lstm", "float32", True),
        ("rnn_tanh", "float32", False),
        ("rnn_tanh", "float32", True),
    ],
)
def test_the_goals_sizes_run_in_clusters_on_hopper(plan, card, cell, compute_type, backward):
    """Hidden size 512 and 32 rows."""
    assert plan(card, cell, 512, 32, compute_type, backward).kernel == "cluster"


def test_sums_take_less_room_than_the_operand_of_all_units(emulated):
    """The LSTM's backward scatters sums in a cluster and gathers across the grid; both on 16 blocks, of 512 units."""
    check = getattr(torch.ops, EMULATED).check
    problem = ("lstm", 512, 8, 1, "tf32", True, CARDS["H200"])
    assert check(*problem, Plan("cluster", 16, 8, 16).team) == ""
    assert "shared memory" in check(*problem, Plan("grid", 16, 8, 16).team)


def test_without_clusters_the_whole_chip_is_used(plan):
    made = plan("A100", "lstm", 512, 32, "bfloat16")
    assert made.kernel == "grid"
    assert made.blocks > 1


def test_what_no_chip_holds_goes_step_by_step(plan):
    for card in CARDS:
        assert plan(card, "lstm", 8192, 4, "float32").kernel == "steps"


def test_a_plan_for_fewer_rows_is_never_modelled_slower(plan):
    for card, cell, compute_type in itertools.product(CARDS, CELLS, DTYPES):
        times = [plan(card, cell, 512, batch, compute_type).nanoseconds for batch in (1, 8, 32, 128)]
        assert times == sorted(times)


@pytest.mark.parametrize(("batch", "lanes"), [(65000, 256), (65535, 65535)])
def test_more_blocks_than_an_int_counts_are_not_taken_for_few(emulated, batch, lanes):
    """Ensembles of many members: 132 blocks to a row are more than 2^31, and so may the teams be."""
    ops, problem = getattr(torch.ops, EMULATED), ("rnn_tanh", 16, batch, lanes, "float32", False, CARDS["H200"])
    assert "at once" in ops.check(*problem, Plan("grid", 132, 1, 16).team)
    assert min(made.nanoseconds for made in _parse(ops.plans(*problem))) > 0


def test_what_just_fits_a_card_runs_there(emulated):
    ops, problem = getattr(torch.ops, EMULATED), ("lstm", 256, 32, 1, "bfloat16", False)
    made = next(made for made in _parse(ops.plans(*problem, CARDS["A100"])) if made.kernel == "grid")
    card = [80, made.blocks * -(-32 // made.rows), made.shared_bytes, 0, 0, 0, 0]
    assert ops.check(*problem, card, made.team) == ""
    assert "at once" in ops.check(*problem, [card[0], card[1] - 1, *card[2:]], made.team)
    assert "shared memory" in ops.check(*problem, [*card[:2], card[2] - 1, *card[3:]], made.team)


@pytest.mark.parametrize(
    ("card", "compute_type", "team", "why"),
    [
        ("A100", "float32", Plan("cluster", 4, 4, 16), "compute capability 9.0"),
        ("H200", "float64", Plan("cluster", 4, 2, 16), "no float64 cluster"),
        ("H200", "float32", Plan("block", 1, 1, 16), "shared memory"),
        ("RTX 4060", "bfloat16", Plan("grid", 24, 8, 16), "at once"),
        ("H200", "bfloat16", Plan("cluster", 8, 12, 16), "rows by eight"),
        ("H200", "float32", Plan("block", 1, 0, 16), "a block, a row and a warp at least"),
        ("H200", "float32", Plan("grid", 0, 8, 16), "a block, a row and a warp at least"),
        ("H200", "float32", Plan("block", 1, 8, 0), "a block, a row and a warp at least"),
    ],
)
def test_a_refusal_says_why(emulated, card, compute_type, team, why):
    refusal = getattr(torch.ops, EMULATED).check("lstm", 256, 32, 1, compute_type, False, CARDS[card], team.team)
    assert why in refusal
