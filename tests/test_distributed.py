"""DDP and both FSDPs over two processes on a CPU: two steps of training give the weights that one process gets."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

import rnnfast

RANKS, STEPS, INPUTS = 2, 5, 3


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lower = nn.LSTM(INPUTS, 8, num_layers=2, bidirectional=True)
        self.upper = nn.GRU(16, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self.head(self.upper(self.lower(input)[0])[0])
        return output


def train(model: nn.Module, input: Tensor, rank: int | None = None) -> None:
    """Two steps; `rank` is the half of the batch that is this process's."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(2):
        part = input if rank is None else input.chunk(RANKS, dim=1)[rank]
        model(part).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def wrap_ddp(model: Model) -> tuple[nn.Module, Any]:
    wrapped = nn.parallel.DistributedDataParallel(model)
    return wrapped, wrapped.module.state_dict


def wrap_fsdp1(model: Model, use_orig_params: bool) -> tuple[nn.Module, Any]:
    from torch.distributed import fsdp
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    wrapped = fsdp.FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy({nn.LSTM, nn.GRU}),
        use_orig_params=use_orig_params,
        device_id=torch.device("cpu"),
    )

    def state_dict() -> Any:
        with fsdp.FullyShardedDataParallel.state_dict_type(wrapped, fsdp.StateDictType.FULL_STATE_DICT):
            return wrapped.state_dict()

    return wrapped, state_dict


def wrap_fsdp2(model: Model) -> tuple[nn.Module, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (RANKS,))
    for module in (model.lower, model.upper, model):
        fully_shard(module, mesh=mesh)
    return model, lambda: {name: value.full_tensor() for name, value in model.state_dict().items()}  # type: ignore[attr-defined]


WRAPPERS: dict[str, Any] = {
    "DDP": wrap_ddp,
    "FSDP": lambda model: wrap_fsdp1(model, use_orig_params=False),
    "FSDP, original parameters": lambda model: wrap_fsdp1(model, use_orig_params=True),
    "fully_shard": wrap_fsdp2,
}


def work(rank: int, folder: str) -> None:
    warnings.simplefilter("ignore")  # torch's own, of its wrappers
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", RANKS)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    input = torch.load(f"{folder}/input.pt")
    for name, wrap in WRAPPERS.items():
        model = Model()
        rnnfast.accelerate(model)
        wrapped, state_dict = wrap(model)
        train(wrapped, input, rank)
        state = state_dict()
        if rank == 0:
            torch.save(state, f"{folder}/{name}.pt")
    distributed.destroy_process_group()
    # Without an interpreter's usual end, which torch's threads abort at times, whatever the layers.
    os._exit(0)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    folder = tmp_path_factory.mktemp("distributed")
    torch.save(torch.randn(STEPS, 2 * RANKS, INPUTS), folder / "input.pt")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=RANKS)
    return folder


@pytest.mark.parametrize("name", WRAPPERS)
def test_two_processes_train_as_one(name: str, results: Path) -> None:
    model = Model()
    train(model, torch.load(results / "input.pt"))
    torch.testing.assert_close(torch.load(results / f"{name}.pt"), dict(model.state_dict()))
