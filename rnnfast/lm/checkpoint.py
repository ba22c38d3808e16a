"""Checkpoints: one safetensors file a run, so that nothing in it can be executed and none can be half old, half new.

The file's header carries, as JSON, the configuration, the vocabulary and where the run stands; its tensors are the
parameters ("model.*") and what a run needs to go on bit for bit ("optimizer.*", "carry.*", "rng.*").
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from rnnfast.errors import UserError, reason
from rnnfast.files import atomic_write, expanded
from rnnfast.lm.config import TrainConfig, build_model, check_backend, pick_device
from rnnfast.lm.vocab import Vocab

FORMAT = "rnnfast-lm"
VERSION = 1
FILE_NAME = "checkpoint.safetensors"


@dataclass
class Checkpoint:
    """What a checkpoint holds. `config`, `vocab` and `progress` are plain JSON values."""

    config: dict[str, Any]
    vocab: list[str]
    progress: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def group(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names start with `prefix` and a dot, without it."""
        return {name[len(prefix) + 1 :]: t for name, t in self.tensors.items() if name.startswith(prefix + ".")}

    def save(self, path: Path) -> None:
        """Write the file atomically.

        Raises:
            UserError: it cannot be written, or its vocabulary is too large; the previous checkpoint is untouched.
        """
        metadata = {
            "format": FORMAT,
            "version": str(VERSION),
            "config": json.dumps(self.config),
            "vocab": json.dumps(self.vocab, ensure_ascii=False),  # a header's room is limited, and escapes are long
            "progress": json.dumps(self.progress),
        }
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}
        try:
            data = safetensors.torch.save(tensors, metadata)
        except safetensors.SafetensorError as error:
            if "header too large" not in str(error):
                raise
            raise UserError(
                f"the vocabulary of {len(self.vocab):,} tokens is too large for a checkpoint, whose header may have "
                "100 MB: leave rare tokens out with --min-freq, or take --tokens char"
            ) from error
        atomic_write(path, data)


def find(path: Path | str) -> Path:
    """The checkpoint at `path`, itself a checkpoint or the folder of a run."""
    path = expanded(path)
    return path / FILE_NAME if path.is_dir() else path


def load(path: Path | str) -> Checkpoint:
    """Read a checkpoint, given by its file or its run's folder.

    Raises:
        UserError: it is missing, truncated, of another format or version, or a pickle, which is never executed.
    """
    path = find(path)
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except (OSError, ValueError) as error:
        advice = f"name the folder of a run, or its {FILE_NAME}"
        raise UserError(f"cannot read the checkpoint {path}: {reason(error)}; {advice}") from error
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            check_version(path, metadata)
            header = {key: json.loads(metadata[key]) for key in ("config", "vocab", "progress")}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
            checkpoint = Checkpoint(**header, tensors=tensors)
    except OSError as error:  # it opens, but cannot be mapped into memory, such as a device
        raise UserError(f"cannot read the checkpoint {path}: {reason(error)}") from error
    except (safetensors.SafetensorError, KeyError, ValueError, RecursionError) as error:
        is_ours = start[8:] == b"{"  # behind the length of its header, which is JSON
        if start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and not is_ours):
            raise UserError(
                f"{path} is a pickle (torch.save) file, which can run code when it is loaded; "
                "rnnfast opens only the safetensors checkpoints that `rnnfast train` writes"
            ) from error
        if start[8:] and not is_ours:
            raise UserError(f"{path} is no checkpoint: name a run's folder, or its {FILE_NAME}") from error
        raise UserError(f"{path} is truncated or damaged ({error}): train again, or take another copy") from error
    if not isinstance(checkpoint.config, dict) or not isinstance(checkpoint.progress, dict):
        raise UserError(f"{path} is damaged (its header is not what rnnfast writes): take another copy")
    if not isinstance(checkpoint.vocab, list) or not all(isinstance(token, str) for token in checkpoint.vocab):
        raise UserError(f"{path} is damaged (its vocabulary is no list of tokens): take another copy")
    try:
        Vocab.from_list(checkpoint.vocab)
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): take another copy") from error
    return checkpoint


def check_version(path: Path, metadata: dict[str, str]) -> None:
    """Refuse safetensors files that are no checkpoint of ours, or of another format version."""
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} is a safetensors file but no rnnfast checkpoint: give one that `rnnfast train` wrote")
    if metadata.get("version") != str(VERSION):
        raise UserError(
            f"{path} has checkpoint format version {metadata.get('version')}, this rnnfast reads version {VERSION}: "
            "use the rnnfast that wrote it, or train again"
        )


def load_parameters(model: nn.Module, tensors: dict[str, Tensor], where: Path | str) -> None:
    """Copy saved parameters into a model, keeping its memory layout.

    Raises:
        UserError: names or shapes are not the model's.
    """
    parameters = dict(model.named_parameters())
    if parameters.keys() != tensors.keys():
        odd = ", ".join(sorted(parameters.keys() ^ tensors.keys()))
        raise UserError(f"{where} does not fit its own configuration (parameters {odd}): take another copy")
    for name, parameter in parameters.items():
        if parameter.shape != tensors[name].shape:
            raise UserError(f"{where} does not fit its own configuration (the shape of {name}): take another copy")
        with torch.no_grad():
            parameter.copy_(tensors[name])


class Trained(NamedTuple):
    """A model read back from its checkpoint."""

    model: nn.Module
    vocab: Vocab
    config: TrainConfig
    progress: dict[str, Any]


def load_model(path: Path | str, device: str = "auto", backend: str | None = None) -> Trained:
    """The trained model of a checkpoint or a run's folder, in evaluation mode.

    Raises:
        UserError: as `load`; also if the file does not fit its own configuration, or the device or backend is missing.
    """
    saved = load(path)
    config = TrainConfig.from_json(saved.config, str(path))
    if backend is not None:
        config = replace(config, backend=backend)
    target = pick_device(device)
    check_backend(config.backend, target)
    parameters = saved.group("model")
    with torch.device("meta"):  # a size from a damaged file is found out before it takes memory
        load_parameters(build_model(config, len(saved.vocab)), parameters, path)
    with torch.random.fork_rng(devices=[]):  # the start that is drawn here is thrown away
        model = build_model(config, len(saved.vocab)).to(target)
    load_parameters(model, parameters, path)
    return Trained(model.eval(), Vocab.from_list(saved.vocab), config, saved.progress)
