"""torch's own test cases for its recurrent layers and cells (its `module_db`), run against ours."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.testing._internal.common_modules import ModuleErrorEnum, ModuleInfo, module_db
from torch.testing._internal.common_utils import freeze_rng_state
from torch.utils import _pytree as pytree

import rnnfast

OURS: dict[Any, Any] = {
    getattr(nn, name): getattr(rnnfast, name) for name in ("RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell")
}
INFOS = [pytest.param(info, id=info.module_cls.__name__) for info in module_db if info.module_cls in OURS]
LAYER_INFOS = [param for param in INFOS if not param.id.endswith("Cell")]


def cases(info: ModuleInfo, dtype: torch.dtype, requires_grad: bool = False, training: bool = True) -> list[Any]:
    found = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=requires_grad, training=training)
    assert found
    return list(found)


def build(info: ModuleInfo, case: Any, backend: str, dtype: torch.dtype) -> nn.Module:
    constructor = case.constructor_input
    return OURS[info.module_cls](*constructor.args, **constructor.kwargs, backend=backend, dtype=dtype)


def test_all_are_found() -> None:
    assert {param.id for param in INFOS} == {module.__name__ for module in OURS}


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("info", INFOS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("training", [True, False])
def test_forward_and_pickle(info: ModuleInfo, dtype: torch.dtype, training: bool, backend: str) -> None:
    for case in cases(info, dtype, training=training):
        module = build(info, case, backend, dtype).train(training)
        args, kwargs = case.forward_input.args, case.forward_input.kwargs
        with freeze_rng_state():
            outputs = module(*args, **kwargs)
            expected = case.reference_fn(module, *args, **kwargs)
        torch.testing.assert_close(outputs, expected)

        theirs = info.module_cls(*case.constructor_input.args, **case.constructor_input.kwargs, dtype=dtype)
        theirs.load_state_dict(module.state_dict())
        assert repr(module).startswith(repr(theirs)[:-1])
        torch.testing.assert_close(outputs, theirs.train(training)(*args, **kwargs))
        torch.testing.assert_close(pickle.loads(pickle.dumps(module))(*args, **kwargs), outputs, rtol=0, atol=0)


@pytest.mark.parametrize("info", INFOS)
def test_non_contiguous_tensors(info: ModuleInfo, backend: str) -> None:
    def non_contiguous(tensor: Any) -> Any:
        if not isinstance(tensor, torch.Tensor):
            return tensor
        return torch.stack((tensor, tensor), dim=-1)[..., 0].detach().requires_grad_(tensor.requires_grad)

    for case in cases(info, torch.float64, requires_grad=True):
        module = build(info, case, backend, torch.float64)
        twin = copy.deepcopy(module)
        for name, parameter in list(twin.named_parameters()):
            setattr(twin, name, nn.Parameter(non_contiguous(parameter)))
        args = case.forward_input.args
        strided_args = pytree.tree_map(non_contiguous, args)
        results = [m(*a) for m, a in ((module, args), (twin, strided_args))]
        torch.testing.assert_close(results[1], results[0])
        gradients = []
        for m, a, result in ((module, args, results[0]), (twin, strided_args, results[1])):
            leaves = [*(t for t in pytree.tree_leaves(a) if isinstance(t, torch.Tensor)), *m.parameters()]
            total = sum(t.square().sum() for t in pytree.tree_leaves(result))
            gradients.append(torch.autograd.grad(total, leaves))
        torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("info", INFOS)
@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_gradients(info: ModuleInfo, check: Any, backend: str) -> None:
    for case in cases(info, torch.float64, requires_grad=True):
        if case.constructor_input.kwargs.get("batch_first") and case.forward_input.args[0].dim() == 2:
            continue  # of input that is not batched it changes nothing, and these checks are slow
        module = build(info, case, backend, torch.float64)
        names = [name for name, _ in module.named_parameters()]
        flat_args, spec = pytree.tree_flatten(case.forward_input.args)

        def function(*tensors: torch.Tensor, module: Any = module, names: Any = names, spec: Any = spec) -> Any:
            parameters = dict(zip(names, tensors, strict=False))
            args = pytree.tree_unflatten(list(tensors[len(names) :]), spec)
            return tuple(pytree.tree_leaves(torch.func.functional_call(module, parameters, args)))

        inputs = (*(p.detach().requires_grad_() for p in module.parameters()), *flat_args)
        assert check(function, inputs, fast_mode=True)


@pytest.mark.parametrize("info", INFOS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_errors(info: ModuleInfo, dtype: torch.dtype, backend: str) -> None:
    found = info.module_error_inputs_func(info, device="cpu", dtype=dtype, requires_grad=False, training=True)
    assert found
    for case in found:
        constructor, forward = case.module_error_input.constructor_input, case.module_error_input.forward_input
        if case.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(case.error_type, match=case.error_regex):
                OURS[info.module_cls](*constructor.args, **constructor.kwargs)
        else:
            assert case.error_on == ModuleErrorEnum.FORWARD_ERROR
            module = OURS[info.module_cls](*constructor.args, **constructor.kwargs, backend=backend)
            with pytest.raises(case.error_type, match=case.error_regex):
                module(*forward.args, **forward.kwargs)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("info", INFOS)
def test_factory_kwargs_and_moves(info: ModuleInfo) -> None:
    for case in cases(info, torch.float32):
        args, kwargs = case.constructor_input.args, case.constructor_input.kwargs
        module = OURS[info.module_cls](*args, **kwargs, device="meta", dtype=torch.float64)
        assert all(p.is_meta and p.dtype == torch.float64 for p in module.parameters())
        module = module.to_empty(device="cpu").float()
        module.reset_parameters()
        saved = copy.deepcopy(module.state_dict())
        module.reset_parameters()
        module.load_state_dict(saved)
        torch.testing.assert_close(module.state_dict(), saved, rtol=0, atol=0)
        module(*case.forward_input.args)


@pytest.mark.parametrize("info", LAYER_INFOS)
def test_train_and_eval_differ_where_there_is_dropout(info: ModuleInfo, backend: str) -> None:
    assert info.train_and_eval_differ
    module = OURS[info.module_cls](3, 4, num_layers=2, dropout=0.5, backend=backend)
    input = torch.randn(5, 2, 3)
    torch.testing.assert_close(module.eval()(input)[0], module(input)[0], rtol=0, atol=0)
    assert not torch.equal(module.train()(input)[0], module(input)[0])
