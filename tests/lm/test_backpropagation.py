"""A loss's gradients and training steps in C++: they have the bits of autograd, which does what it is needed for."""

from __future__ import annotations

import copy
import functools
import importlib
from collections import OrderedDict
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from rnnfast.backends import cpu
from rnnfast.lm import RNNLM, RNNLMScratch, generate, train_step, train_steps
from rnnfast.lm.backpropagation import backpropagate

pytestmark = pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))
module = importlib.import_module("rnnfast.lm.backpropagation")
VOCABULARY, N, T, B, UNITS = 28, 5, 12, 4, 24
CELLS: dict[str, dict[str, Any]] = {"rnn": {}, "rnn_relu": {"num_layers": 2}, "lstm": {"num_layers": 3}, "gru": {}}


def batches() -> tuple[Tensor, Tensor]:
    """Inputs and targets (N, T, B)."""
    torch.manual_seed(5)
    ids = torch.randint(VOCABULARY, (N, T + 1, B))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def model_of(cell: str, units: int = UNITS, **options: Any) -> RNNLM:
    torch.manual_seed(2)
    return RNNLM(VOCABULARY, cell, units, **options)


def scratch() -> RNNLMScratch:
    torch.manual_seed(2)
    model = RNNLMScratch(VOCABULARY, UNITS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return model


def flat(state: Any) -> tuple[Tensor, ...]:
    return state if isinstance(state, tuple) else (state,)


@pytest.fixture
def by_autograd(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The losses that autograd has gone back from."""
    calls: list[str] = []
    loss_of = module.loss_of

    def spying(*args: Any) -> Any:
        calls.append("loss")
        return loss_of(*args)

    monkeypatch.setattr(module, "loss_of", spying)
    return calls


@pytest.fixture
def descents(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of steps that were one operator."""
    counts: list[int] = []
    trainer = importlib.import_module("rnnfast.lm.trainer")
    descend = trainer.descend

    def spying(*args: Any) -> Any:
        found = descend(*args)
        counts.extend([] if found is None else [len(args[2])])
        return found

    monkeypatch.setattr(trainer, "descend", spying)
    return counts


def watched(model: Any) -> Any:
    """By a hook, which autograd alone runs."""
    next(model.parameters()).register_hook(lambda gradient: None)
    return model


def steps_of(model: Any, lr: float = 0.5, clip: float = 1.0, carries: bool = True) -> list[Tensor]:
    """Losses, states, gradients and parameters of single steps."""
    optimizer, state, found = torch.optim.SGD(model.parameters(), lr=lr), None, []
    for x, y in zip(*batches(), strict=True):
        loss, state = train_step(model, optimizer, x, y, state if carries else None, clip)
        found += [loss, *flat(state)]
        found += [parameter.grad.clone() for parameter in model.parameters()]
    return [*found, *(parameter.detach() for parameter in model.parameters())]


@pytest.mark.parametrize("cell", CELLS)
def test_a_step_has_the_bits_of_autograd(cell: str, by_autograd: list[str]) -> None:
    found = steps_of(model_of(cell, **CELLS[cell]))
    assert not by_autograd
    expected = steps_of(watched(model_of(cell, **CELLS[cell])))
    assert len(by_autograd) == N
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))


def test_a_step_of_the_model_from_scratch(by_autograd: list[str]) -> None:
    found = steps_of(scratch())
    assert not by_autograd
    torch.testing.assert_close(found, steps_of(watched(scratch())), rtol=1e-5, atol=1e-6)
    assert len(by_autograd) == N


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(("clip", "lr", "carries"), [(1.0, 0.3, True), (0.05, 1.0, False), (0.0, 0.01, True)])
def test_many_steps_have_the_bits_of_single_ones(
    cell: str, clip: float, lr: float, carries: bool, descents: list[int], by_autograd: list[str]
) -> None:
    model, single = model_of(cell, **CELLS[cell]), model_of(cell, **CELLS[cell])
    optimizer, loss_sum, state = torch.optim.SGD(model.parameters(), lr=lr), torch.zeros((), dtype=torch.float64), None
    inputs, targets = batches()
    for part in (slice(0, 1), slice(1, 3), slice(3, 5)):
        arguments = inputs[part], targets[part], state if carries else None, loss_sum, clip
        state = train_steps(model, optimizer, *arguments, carries=carries)
    assert descents == [1, 2, 2]
    found = steps_of(watched(single), lr, clip, carries)
    assert len(by_autograd) == N
    assert all(map(torch.equal, model.parameters(), single.parameters()))
    of_step = len(flat(state)) + 1 + len([*model.parameters()])
    losses = found[: N * of_step : of_step]
    assert loss_sum.item() == sum(loss.double().item() for loss in losses)
    last = found[(N - 1) * of_step + 1 :]
    assert all(map(torch.equal, flat(state), last))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_many_steps_of_the_model_from_scratch(descents: list[int]) -> None:
    model, single = scratch(), scratch()
    loss_sum = torch.zeros((), dtype=torch.float64)
    train_steps(model, torch.optim.SGD(model.parameters(), lr=0.5), *batches(), None, loss_sum, 1.0)
    assert descents == [N]
    steps_of(watched(single))
    torch.testing.assert_close([*model.parameters()], [*single.parameters()], rtol=1e-5, atol=1e-6)


def test_the_number_of_threads_changes_no_bit(descents: list[int]) -> None:
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            torch.manual_seed(2)
            model = RNNLM(VOCABULARY, "gru", 200, 2)  # so many parameters that threads share them
            torch.manual_seed(3)
            inputs, targets = torch.randint(VOCABULARY, (2, 3, 35, 8))
            loss_sum = torch.zeros((), dtype=torch.float64)
            optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
            state = train_steps(model, optimizer, inputs, targets, None, loss_sum, 1.0)
            found.append([loss_sum, state, *(parameter.detach() for parameter in model.parameters())])
    finally:
        torch.set_num_threads(before)
    assert descents == [3, 3, 3]
    assert all(map(torch.equal, found[0], found[1]))
    assert all(map(torch.equal, found[0], found[2]))


def test_weights_that_it_has_changed_are_seen() -> None:
    model, (inputs, targets) = model_of("gru"), batches()
    before = list(generate(model, [1], 40))
    with torch.no_grad():
        model(inputs[0])  # both keep packed weights
    loss_sum = torch.zeros((), dtype=torch.float64)
    train_steps(model, torch.optim.SGD(model.parameters(), lr=5.0), inputs, targets, None, loss_sum, 0.0)
    copied = model_of("gru")
    copied.load_state_dict(model.state_dict())
    after = list(generate(model, [1], 40))
    assert after != before
    assert after == list(generate(copied, [1], 40))
    with torch.no_grad():
        assert torch.equal(model(inputs[0])[0], copied(inputs[0])[0])


def test_a_step_between_forward_and_backward_is_an_error() -> None:
    model, (inputs, targets) = model_of("gru"), batches()
    logits, _ = model(inputs[0])
    loss_sum = torch.zeros((), dtype=torch.float64)
    train_steps(model, torch.optim.SGD(model.parameters(), lr=0.5), inputs, targets, None, loss_sum, 1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logits.sum().backward()


def test_it_adds_to_the_gradients_there_are(by_autograd: list[str]) -> None:
    model, (inputs, targets) = model_of("gru"), batches()
    backpropagate(model, inputs[0], targets[0], None)
    held = [parameter.grad for parameter in model.parameters()]
    once = [gradient.clone() for gradient in held if gradient is not None]
    backpropagate(model, inputs[0], targets[0], None)
    assert not by_autograd
    for parameter, gradient, first in zip(model.parameters(), held, once, strict=True):
        assert parameter.grad is gradient
        assert torch.equal(gradient, 2 * first)


class Doubled(RNNLM):
    def hidden_states(self, ids: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        output, state = super().hidden_states(ids, state)
        return 2 * output, state


def changed(change: Callable[[RNNLM], Any]) -> Callable[[], RNNLM]:
    def build() -> RNNLM:
        model = model_of("gru", num_layers=2)
        change(model)
        return model

    return build


def nothing(*_: Any) -> None:
    pass


def tie(model: RNNLM) -> None:
    model.rnn.bias_hh_l1 = model.rnn.bias_ih_l1


# What autograd or the modules' own calls have to do, since they have other parts or somebody would notice.
MODELS: dict[str, Callable[[], Any]] = {
    "embedding": lambda: model_of("gru", embedding_size=6),
    "dropout": lambda: model_of("lstm", dropout=0.5),
    "both directions": lambda: model_of("rnn", bidirectional=True),
    "reference": lambda: model_of("gru", backend="reference"),
    "float64": lambda: model_of("gru").double(),
    "subclass": lambda: Doubled(VOCABULARY, "gru", UNITS),
    "layer's forward hook": changed(lambda model: model.rnn.register_forward_hook(nothing)),
    "layer's forward pre-hook": changed(lambda model: model.rnn.register_forward_pre_hook(nothing)),
    "layer's backward hook": changed(lambda model: model.rnn.register_full_backward_hook(nothing)),
    "layer's backward pre-hook": changed(lambda model: model.rnn.register_full_backward_pre_hook(nothing)),
    "hook of a parameter": changed(lambda model: model.rnn.weight_hh_l1.register_hook(nothing)),
    "hook behind a parameter": changed(lambda model: model.head.bias.register_post_accumulate_grad_hook(nothing)),
    "frozen parameter": changed(lambda model: model.rnn.bias_hh_l0.requires_grad_(False)),
    "frozen head": changed(lambda model: model.head.weight.requires_grad_(False)),
    "tied parameters": changed(tie),
    "layer's own dropout": changed(lambda model: setattr(model.rnn, "dropout", 0.5)),
}
CONTEXTS: dict[str, Callable[[], Any]] = {
    "anomaly detection": torch.autograd.detect_anomaly,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "profiler": torch.autograd.profiler.profile,
    "hooks on saved tensors": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection", "ignore:Full backward hook")
@pytest.mark.parametrize("why", [*MODELS, *CONTEXTS])
def test_autograd_does_the_rest(why: str, by_autograd: list[str], descents: list[int]) -> None:
    model, (inputs, targets) = MODELS[why]() if why in MODELS else model_of("gru"), batches()
    with ExitStack() as stack:
        if why in CONTEXTS:
            stack.enter_context(CONTEXTS[why]())
        loss, state = backpropagate(model, inputs[0], targets[0], None)
        assert by_autograd == ["loss"]
        assert not any(tensor.requires_grad for tensor in (loss, *flat(state)))
        assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())
        loss_sum = torch.zeros((), dtype=torch.float64)
        train_steps(model, torch.optim.SGD(model.parameters(), lr=0.5), inputs[:2], targets[:2], None, loss_sum, 1.0)
        assert len(by_autograd) == 3
        assert not descents


# The large one's parameters and hidden states are shared by threads when they are copied.
@pytest.mark.parametrize("cell", [*CELLS, "scratch", "large"])
def test_bfloat16_has_the_states_of_autocast_and_is_as_exact(cell: str, by_autograd: list[str]) -> None:
    build = {"scratch": scratch, "large": lambda: model_of("rnn", 1400)}
    build |= {cell: functools.partial(model_of, cell, **options) for cell, options in CELLS.items()}
    model, other, wide = (build[cell]() for _ in range(3))
    inputs, targets = batches()
    loss, state = backpropagate(model, inputs[0], targets[0], None, "bfloat16")
    loss, state = backpropagate(model, inputs[1], targets[1], state, "bfloat16")
    assert not by_autograd
    watched(other)
    _, expected = backpropagate(other, inputs[0], targets[0], None, "bfloat16")
    _, expected = backpropagate(other, inputs[1], targets[1], expected, "bfloat16")
    assert by_autograd == ["loss", "loss"]
    assert all(map(torch.equal, flat(state), flat(expected)))
    wide.double()
    _, expected = backpropagate(wide, inputs[0], targets[0], None)
    truth, _ = backpropagate(wide, inputs[1], targets[1], expected)
    assert loss.item() == pytest.approx(truth.item(), rel=2e-3)
    for ours, theirs, right in zip(model.parameters(), other.parameters(), wide.parameters(), strict=True):
        error, autocast = (
            (p.grad.double() - right.grad).norm()
            for p in (ours, theirs)
            if p.grad is not None and right.grad is not None
        )
        assert error < 1.1 * autocast


@pytest.mark.parametrize("cell", CELLS)
def test_many_steps_in_bfloat16_have_the_bits_of_single_ones(cell: str, descents: list[int]) -> None:
    model, single = model_of(cell, **CELLS[cell]), model_of(cell, **CELLS[cell])
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.3) for each in (model, single)]
    loss_sum, losses = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    inputs, targets = batches()
    state = train_steps(model, optimizers[0], inputs[:2], targets[:2], None, loss_sum, 0.5, "bfloat16")
    state = train_steps(model, optimizers[0], inputs[2:], targets[2:], state, loss_sum, 0.5, "bfloat16")
    assert descents == [2, 3]
    expected = None
    for x, y in zip(inputs, targets, strict=True):
        loss, expected = train_step(single, optimizers[1], x, y, expected, 0.5, "bfloat16")
        losses += loss
    assert torch.equal(loss_sum, losses)
    assert all(map(torch.equal, flat(state), flat(expected)))
    assert all(map(torch.equal, model.parameters(), single.parameters()))


class OwnSGD(torch.optim.SGD):
    pass


def scheduled(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    return optimizer


def with_hook(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    optimizer.register_step_post_hook(nothing)
    return optimizer


@pytest.mark.parametrize(
    "build",
    [
        lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
        lambda parameters: torch.optim.SGD(parameters, lr=0.5, momentum=0.9),
        lambda parameters: torch.optim.SGD(parameters, lr=0.5, weight_decay=0.1),
        lambda parameters: torch.optim.SGD(parameters, lr=0.5, maximize=True),
        lambda parameters: torch.optim.SGD(parameters, lr=torch.tensor(0.5)),
        lambda parameters: torch.optim.SGD(parameters[1:], lr=0.5),
        lambda parameters: torch.optim.SGD([{"params": parameters[:2]}, {"params": parameters[2:]}], lr=0.5),
        lambda parameters: OwnSGD(parameters, lr=0.5),
        scheduled,
        with_hook,
    ],
)
def test_what_the_optimizer_does_besides_is_done(
    build: Callable[[list[nn.Parameter]], torch.optim.Optimizer], descents: list[int], by_autograd: list[str]
) -> None:
    ours, theirs = model_of("gru"), model_of("gru")
    inputs, targets = batches()
    loss_sum, state = torch.zeros((), dtype=torch.float64), None
    train_steps(ours, build([*ours.parameters()]), inputs, targets, None, loss_sum, 1.0)
    assert not descents
    assert not by_autograd  # the gradients are still those of the operator
    optimizer = build([*theirs.parameters()])
    for x, y in zip(inputs, targets, strict=True):
        optimizer.zero_grad()
        logits, state = theirs(x, None if state is None else state.detach())
        nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten()).backward()
        of_optimizer = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        nn.utils.clip_grad_norm_(of_optimizer, 1.0)
        optimizer.step()
    torch.testing.assert_close([*ours.parameters()], [*theirs.parameters()], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("register", [register_optimizer_step_pre_hook, register_optimizer_step_post_hook])
def test_hooks_of_all_optimizers_see_each_step(
    register: Callable[..., Any], descents: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = model_of("gru"), []
    monkeypatch.setattr(module.torch_optimizer, "_global_optimizer_post_hooks", OrderedDict())  # not even our own
    handle = register(lambda *args: seen.append(1))
    try:
        loss_sum = torch.zeros((), dtype=torch.float64)
        train_steps(model, torch.optim.SGD(model.parameters(), lr=0.5), *batches(), None, loss_sum, 1.0)
    finally:
        handle.remove()
    assert len(seen) == N
    assert not descents


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")  # ids have no gradients
@pytest.mark.parametrize("of_all", [False, True])
def test_backward_hooks_of_modules_see_each_step(of_all: bool, descents: list[int]) -> None:
    model, seen = model_of("gru"), []
    of_modules = nn.modules.module.register_module_full_backward_hook
    register = of_modules if of_all else model.head.register_full_backward_hook
    handle = register(lambda module, *args: seen.append(module))
    try:
        loss_sum = torch.zeros((), dtype=torch.float64)
        train_steps(model, torch.optim.SGD(model.parameters(), lr=0.5), *batches(), None, loss_sum, 1.0)
    finally:
        handle.remove()
    assert seen.count(model.head) == N
    assert not descents


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip": float("nan")}, "clip is the largest norm of the gradient, or 0 for any, got nan"),
        ({"clip": -1.0}, "clip is the largest norm"),
        ({"precision": "bf16"}, "precision is 'float32' or 'bfloat16', got 'bf16'"),
        ({"precision": torch.bfloat16}, "precision is 'float32' or 'bfloat16', got torch.bfloat16"),
    ],
)
def test_options_of_steps_are_checked(options: dict[str, Any], message: str) -> None:
    model, (inputs, targets), loss_sum = model_of("gru"), batches(), torch.zeros((), dtype=torch.float64)
    optimizer, options = torch.optim.SGD(model.parameters(), lr=0.5), {"clip": 1.0} | options
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        train_step(model, optimizer, inputs[0], targets[0], None, **options)
    with pytest.raises(ValueError, match=message):
        train_steps(model, optimizer, inputs, targets, None, loss_sum, **options)
    with pytest.raises(ValueError, match=r"train_steps takes batches of token ids \(N, T, B\), got \(12, 4\)"):
        train_steps(model, optimizer, inputs[0], targets[0], None, loss_sum, 1.0)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("token", [-1, VOCABULARY])
@pytest.mark.parametrize("which", ["inputs", "targets"])
def test_a_token_outside_the_vocabulary(which: str, token: int) -> None:
    model, (inputs, targets) = model_of("gru"), batches()
    {"inputs": inputs, "targets": targets}[which][2, 3, 1] = token
    before = [parameter.detach().clone() for parameter in model.parameters()]
    message = rf"{token} in row {{}} is outside \[0, {VOCABULARY}\)"
    with pytest.raises(RuntimeError, match=message.format(3 * B + 1)):
        backpropagate(model, inputs[2], targets[2], None)
    loss_sum, optimizer = torch.zeros((), dtype=torch.float64), torch.optim.SGD(model.parameters(), lr=0.5)
    with pytest.raises(RuntimeError, match=message.format(2 * T * B + 3 * B + 1)):
        train_steps(model, optimizer, inputs, targets, None, loss_sum, 1.0)
    assert loss_sum == 0
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_states_of_another_kind_are_told_as_ever(cell: str) -> None:
    model, (inputs, targets) = model_of(cell), batches()
    h = torch.zeros(1, B, UNITS)
    for state in (h, h[:, :-1], (h, h), (h, h[..., :-1]), h.double()):
        expected: Any = None
        try:
            model.hidden_states(inputs[0], state)
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            expected = error
        if expected is None:
            backpropagate(model, inputs[0], targets[0], state)
        else:
            with pytest.raises(type(expected)) as raised:
                backpropagate(model, inputs[0], targets[0], state)
            assert str(raised.value) == str(expected)


def arguments() -> dict[str, Any]:
    """Of `backpropagate_cpu`, for a GRU."""
    inputs, targets = batches()
    memory = [parameter.detach() for parameter in model_of("gru").parameters()]
    return {
        "inputs": inputs[0],
        "targets": targets[0],
        "parameters": memory,
        "gradients": [torch.empty_like(tensor) for tensor in memory],
        "h_0": torch.zeros(1, B, UNITS),
        "c_0": None,
        "cell": "gru",
    }


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("inputs", torch.zeros(T, B), "inputs must be .*Long|inputs"),
        ("inputs", torch.zeros(T * B, dtype=torch.int64), "inputs must be of"),
        ("targets", torch.zeros(T, B + 1, dtype=torch.int64), "targets"),
        ("parameters", [], "two, three or four parameters a layer"),
        ("parameters", arguments()["parameters"][:-1], "w_ih|w_hh|head|bias"),
        ("parameters", arguments()["parameters"][::-1], "w_ih|head"),
        ("gradients", [], "a gradient for each parameter"),
        ("gradients", arguments()["gradients"][::-1], "as many elements as its parameter"),
        ("h_0", torch.zeros(1, B, UNITS + 1), "w_ih|h_0"),
        ("h_0", torch.zeros(B, UNITS), "h_0 must be of"),
        ("c_0", torch.zeros(1, B, UNITS), "c_0 must be given for an lstm"),
        ("cell", "lstm", "w_ih"),
        ("cell", "cnn", "unknown cell cnn"),
    ],
)
def test_the_operators_refuse_what_does_not_fit(name: str, value: Any, message: str) -> None:
    cpu.load()
    torch.ops.rnnfast.backpropagate_cpu(**arguments())
    with pytest.raises(RuntimeError, match=message):
        torch.ops.rnnfast.backpropagate_cpu(**arguments() | {name: value})
    steps = {key: found for key, found in arguments().items() if key != "gradients"}
    steps |= {"inputs": steps["inputs"][None], "targets": steps["targets"][None], "carries": True}
    steps |= {"loss_sum": torch.zeros((), dtype=torch.float64), "learning_rate": 0.1, "max_norm": 1.0}
    torch.ops.rnnfast.train_cpu(**steps)
    with pytest.raises(RuntimeError, match="loss_sum"):
        torch.ops.rnnfast.train_cpu(**steps | {"loss_sum": torch.zeros(())})
    if name != "gradients":
        wrong = value[None] if name in ("inputs", "targets") else value
        with pytest.raises(RuntimeError, match=message):
            torch.ops.rnnfast.train_cpu(**steps | {name: wrong})
