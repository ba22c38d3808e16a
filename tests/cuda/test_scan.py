"""The CUDA kernels themselves, run on the CPU by the emulator, against the reference in float64."""

import pytest
import torch

from rnnfast.backends.cuda import launch
from rnnfast.backends.cuda.launch import Plan
from rnnfast.cells import CELLS
from tests.scans import random_layer

from .layers import DTYPES, check_against_truth

# Teams small enough that little layers take several blocks, row tiles, column groups and chunks of the depth. Where the
# second team is given it is for tensor cores, which take rows by eight.
TEAMS = {
    "block": (Plan("block", 1, 3, 3), Plan("block", 1, 8, 4)),
    "cluster": (Plan("cluster", 2, 5, 4), Plan("cluster", 2, 8, 4)),
    "grid": (Plan("grid", 3, 2, 2), Plan("grid", 3, 8, 4)),
    "steps": (Plan("steps", 0, 0, 0), Plan("steps", 0, 0, 0)),
}
CASES = [(k, n) for k in TEAMS for n in DTYPES if (k, n) != ("cluster", "float64")]
SHAPES = {
    # Of many lanes, since an RMS error is of many numbers.
    "one unit, row and step": {"hidden": 1, "batch": 1, "steps": 1, "lanes": 8},
    "both directions": {"hidden": 17, "batch": 4, "steps": 3, "lanes": 2, "bias": False},
    "ragged": {"hidden": 20, "batch": 6, "steps": 4, "lanes": 2, "ragged": True},
    "ragged token ids": {"hidden": 9, "batch": 9, "steps": 3, "lanes": 2, "ragged": True, "token_ids": True},
}


def use(monkeypatch: pytest.MonkeyPatch, plan: Plan, compute_type: str) -> None:
    monkeypatch.setattr(launch, "plan", lambda *_, **__: plan)
    torch.backends.cuda.matmul.allow_tf32 = compute_type == "tf32"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("kernel", "compute_type"), CASES, ids=lambda value: value)
@pytest.mark.parametrize("cell", CELLS)
def test_matches_the_reference(schedule, monkeypatch, cell, kernel, compute_type, shape):
    plan = TEAMS[kernel][compute_type in ("tf32", "bfloat16", "float16")]
    use(monkeypatch, plan, compute_type)
    layer = random_layer(cell, **SHAPES[shape], dtype=DTYPES[compute_type])
    schedule(len(shape))
    check_against_truth(launch.forward, launch.backward, layer, compute_type)


@pytest.mark.parametrize(
    ("cell", "compute_type", "hidden", "batch", "plan"),
    [
        ("rnn_tanh", "float32", 200, 1, Plan("block", 1, 1, 7)),  # 25 column groups; a fourth chunk
        ("rnn_relu", "float32", 65, 9, Plan("cluster", 2, 9, 13)),  # a split depth; row tiles of 4, 4 and 1
        ("lstm", "float32", 65, 2, Plan("cluster", 4, 2, 2)),  # a last block of one unit; 1.5 groups in registers
        ("gru", "float32", 40, 5, Plan("grid", 5, 4, 16)),  # a block to each group; two teams
        ("lstm", "float64", 33, 2, Plan("grid", 2, 2, 3)),
        ("gru", "float64", 33, 2, Plan("block", 1, 2, 3)),
        ("rnn_tanh", "bfloat16", 100, 3, Plan("block", 1, 8, 14)),  # seven column groups, over two splits
        ("lstm", "bfloat16", 80, 17, Plan("cluster", 2, 16, 12)),  # two row tiles and teams
        ("gru", "float16", 49, 3, Plan("cluster", 4, 8, 5)),  # the depth split over warps, some left over
        ("lstm", "tf32", 40, 9, Plan("grid", 3, 8, 2)),
        ("gru", "tf32", 65, 2, Plan("cluster", 2, 8, 6)),
        # Backward in these the cluster's blocks exchange sums.
        ("lstm", "float32", 40, 5, Plan("cluster", 2, 5, 13)),  # parts from both splits of the depth; a warp left over
        ("lstm", "tf32", 100, 2, Plan("cluster", 4, 8, 4)),  # one group in registers, one in shared memory
        ("gru", "bfloat16", 33, 9, Plan("cluster", 4, 16, 4)),  # all groups in registers; a last block with one unit
    ],
)  # fmt: skip
def test_tile_edges(schedule, monkeypatch, cell, compute_type, hidden, batch, plan):
    """Sizes at which work crosses from one tile, chunk, group, warp or block to the next."""
    use(monkeypatch, plan, compute_type)
    layer = random_layer(cell, hidden, batch, 2, DTYPES[compute_type])
    check_against_truth(launch.forward, launch.backward, layer, compute_type)


@pytest.mark.parametrize("compute_type", ["tf32", "bfloat16"])
def test_relu_where_rounding_takes_sums_across_zero(schedule, monkeypatch, compute_type):
    use(monkeypatch, Plan("block", 1, 8, 16), compute_type)
    check_against_truth(
        launch.forward, launch.backward, random_layer("rnn_relu", 64, 8, 20, DTYPES[compute_type]), compute_type
    )


@pytest.mark.parametrize("compute_type", ["float32", "bfloat16"])
@pytest.mark.parametrize("kernel", ["block", "cluster", "grid"])
def test_every_schedule_gives_the_same_bits(schedule, monkeypatch, kernel, compute_type):
    use(monkeypatch, TEAMS[kernel][compute_type == "bfloat16"], compute_type)
    layer = random_layer("lstm", 20, 4, 5, DTYPES[compute_type], lanes=2, ragged=True)
    runs = []
    for seed in range(6):
        schedule(seed)
        outputs = launch.forward(*layer, True)
        gradients = launch.backward(outputs[0], None, None, *layer, outputs[0], outputs[3], True, True)
        runs.append((*outputs, *gradients))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("compute_type", ["float32", "bfloat16"])
def test_weights_that_begin_within_a_vector(schedule, monkeypatch, compute_type):
    """As those that are views of a flat vector of all parameters may."""
    use(monkeypatch, TEAMS["block"][compute_type == "bfloat16"], compute_type)
    layer = random_layer("lstm", 16, 4, 3, DTYPES[compute_type])
    w_hh = layer[2]
    layer[2] = torch.cat((w_hh.flatten()[:1], w_hh.flatten()))[1:].view(w_hh.shape)
    check_against_truth(launch.forward, launch.backward, layer, compute_type)


@pytest.mark.parametrize("compute_type", ["float32", "tf32", "float64"])
def test_a_row_does_not_depend_on_its_batch(schedule, monkeypatch, compute_type):
    plan = Plan("block", 1, 8, 16) if compute_type == "tf32" else Plan("block", 1, 5, 6)
    use(monkeypatch, plan, compute_type)
    dtype = DTYPES[compute_type]
    layer = random_layer("gru", 20, 5, 3, dtype, token_ids=True)  # ids: torch's GEMM would depend on the batch
    output, h_n, _, _ = launch.forward(*layer, False)
    alone = list(layer)
    alone[0], alone[6] = layer[0].view(3, 5)[:, 4].contiguous(), layer[6][:, 4:].contiguous()
    output_alone, h_n_alone, _, _ = launch.forward(*alone, False)
    assert torch.equal(output_alone, output.view(3, 5, -1)[:, 4])
    assert torch.equal(h_n_alone, h_n[:, 4:])


@pytest.mark.parametrize("compute_type", ["float32", "bfloat16"])
def test_nan_stays_in_its_row(schedule, monkeypatch, compute_type):
    use(monkeypatch, TEAMS["cluster"][compute_type == "bfloat16"], compute_type)
    layer = random_layer("lstm", 20, 4, 3, DTYPES[compute_type])
    clean, *_ = launch.forward(*layer, False)
    layer[6] = layer[6].clone()
    layer[6][0, 1] = torch.nan
    output, *_ = launch.forward(*layer, False)
    output, clean = output.view(3, 4, -1), clean.view(3, 4, -1)
    assert output[:, 1].isnan().all()
    assert torch.equal(output[:, [0, 2, 3]], clean[:, [0, 2, 3]])


def test_no_rows_and_no_steps(schedule, monkeypatch):
    use(monkeypatch, TEAMS["block"][0], "float32")
    layer = random_layer("lstm", 5, 3, 0, torch.float32)
    output, h_n, c_n, tape = launch.forward(*layer, True)
    assert output.shape == (0, 5)
    assert tape.shape == (1, 0, 25)
    assert torch.equal(h_n, layer[6])
    assert torch.equal(c_n, layer[7])
    gradients = launch.backward(None, h_n, None, *layer, output, tape, True, True)
    assert torch.equal(gradients[6], h_n)
    assert not gradients[2].any()


@pytest.mark.parametrize("kernel", ["cluster", "steps"])
def test_a_token_id_outside_the_vocabulary_ends_the_kernel(schedule, monkeypatch, kernel):
    use(monkeypatch, TEAMS[kernel][0], "float32")
    layer = random_layer("gru", 8, 4, 3, torch.float32, token_ids=True)
    layer[0][5] = 3
    with pytest.raises(RuntimeError, match="outside the vocabulary in row: 5"):
        launch.forward(*layer, False)


def test_a_team_that_cannot_be_is_an_error(schedule, monkeypatch):
    use(monkeypatch, Plan("block", 1, 8, 1), "float32")
    with pytest.raises(RuntimeError, match="too many states"):
        launch.forward(*random_layer("lstm", 20, 4, 3, torch.float32), False)


def test_more_lanes_than_a_launch_has_are_an_error(schedule, monkeypatch):
    use(monkeypatch, TEAMS["steps"][0], "float32")
    with pytest.raises(RuntimeError, match="at most 65535 lanes"):
        launch.forward(*random_layer("rnn_tanh", 1, 1, 1, torch.float32, lanes=65536), False)


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize(
    ("shape", "cell", "what"),
    [
        ((1 << 15, 1 << 16, 1), "rnn_tanh", "2147483648 states"),
        ((1 << 15, 1, 1 << 14), "lstm", "2147483648 gates of all lanes"),
    ],
)
def test_more_than_an_int_counts_is_an_error(shape, cell, what):
    """Addresses begin with such a count."""
    h_0, row = torch.zeros(1).expand(shape), torch.zeros(1, 1)
    layer = (row, None, None, h_0, None, None, row, None, cell, "float32", False, 1)
    with pytest.raises(RuntimeError, match=f"takes no {what}"):
        launch._ops().step_forward(*layer, 0, row, row, None, row)


def test_strided_tensors_are_refused():
    """As an exported program may pass them, which makes none contiguous that was so in its example."""
    layer = random_layer("lstm", 4, 3, 2, torch.float32)
    layer[7] = layer[7].mT.contiguous().mT
    with pytest.raises(RuntimeError, match="c_0 must be contiguous"):
        launch.forward(*layer, False)


def test_what_it_does_not_compute_is_declined(monkeypatch):
    layer = random_layer("lstm", 4, 1, 1, torch.float32)
    layer[5] = torch.zeros(1, 2, 4)
    with pytest.raises(NotImplementedError, match="proj_size"):
        launch.forward(*layer, False)
