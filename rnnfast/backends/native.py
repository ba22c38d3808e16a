"""The native library: finds the installed one, or compiles csrc/ on first use and keeps the result.

Nothing here runs at import. A library that was installed with the package serves any torch from 2.10 on, as it uses
torch's stable ABI only. One that is compiled on first use is kept in the user's cache, in a folder whose name is a hash
of the sources, the compiler and the torch version. setup.py imports this file without the package, so it imports torch
only where it compiles or loads.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rnnfast import building
from rnnfast.cells import CELLS
from rnnfast.errors import note

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from rnnfast.dispatch import Request

    Key = tuple[str, bool, bool, tuple[int, ...]]  # cell, ids and extended of `packed_weights`, and the weights' ids

_FLAGS = (
    "-std=c++17 -O3 -g0 -fPIC -fopenmp -ffp-contract=off -fvisibility=hidden "
    f"-Wall -Wextra -Wno-psabi -Wno-unknown-pragmas -DTORCH_TARGET_VERSION={building.TARGET_ABI}ULL"
)
_AVX2 = "-mavx2 -mfma"
_AVX512 = f"{_AVX2} -mprfchw -mavx512f -mavx512bw -mavx512dq -mavx512vl"
# csrc/cpu/kernels.cpp is compiled once for each; csrc/cpu/choose.cpp picks one when it runs.
_INSTRUCTION_SETS = {"generic": ""}
if platform.machine() in ("x86_64", "AMD64"):
    _INSTRUCTION_SETS |= {"avx2": _AVX2, "avx512": _AVX512, "avx512_bf16": f"{_AVX512} -mavx512bf16"}
    _INSTRUCTION_SETS["amx"] = f"{_AVX512} -mavx512bf16 -mamx-tile -mamx-bf16"
# Newer than some compilers that know the rest, and an instruction of each; the library is complete without them.
_NEWER = {"avx512_bf16": "vdpbf16ps %zmm0, %zmm0, %zmm0", "amx": "tilezero %tmm0"}

# Operators of this backend alone: weights packed once for many calls without gradients, and what is done with them.
_SCHEMAS = (
    "scan_cpu_pack(Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? w_hr, str cell, bool ids) -> Tensor",
    "scan_extended_cpu_pack(Tensor w_ih, Tensor w_hh, Tensor? w_hr, str cell, bool ids) -> Tensor",
    "scan_cpu_packed(Tensor input, Tensor packed, Tensor h_0, Tensor? c_0, Tensor? batch_sizes, bool bidirectional)"
    " -> (Tensor output, Tensor h_n, Tensor c_n)",
    "weight_samples_cpu(Tensor[] weights, int units, bool whole) -> Tensor",
    "direct_plan_cpu(Tensor[] packed, Tensor weight_samples) -> Tensor",
    "direct_layer_cpu(Tensor w_ih, Tensor w_hh, Tensor? w_hr, str cell, bool ids) -> Tensor",
    "direct_empty_cpu(Tensor like, int[] sizes) -> Tensor",
    "generate_cpu(Tensor[] packed, Tensor? embedding, Tensor head_weight, Tensor? head_bias, Tensor h_0, Tensor? c_0,"
    " int token, int length, Tensor? uniforms, float temperature, int? top_k, float? top_p)"
    " -> (Tensor ids, Tensor h_n, Tensor c_n)",
    "linear_cross_entropy_cpu(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, bool need_gradients)"
    " -> (Tensor loss, Tensor d_hidden, Tensor d_weight, Tensor d_bias)",
    "clip_gradients_cpu(Tensor(a!)[] gradients, float max_norm) -> ()",
    "backpropagate_cpu(Tensor inputs, Tensor targets, Tensor[] parameters, Tensor(a!)[] gradients, Tensor h_0,"
    " Tensor? c_0, str cell) -> (Tensor loss, Tensor h_n, Tensor c_n)",
    "train_cpu(Tensor inputs, Tensor targets, Tensor(a!)[] parameters, Tensor h_0, Tensor? c_0, Tensor(b!) loss_sum,"
    " str cell, bool carries, float learning_rate, float max_norm) -> (Tensor h_n, Tensor c_n)",
)
_lock = threading.Lock()
_library: Any = None
# The C functions of csrc/cpu/direct.h, once the library is loaded. Each takes the bytes of a structure, and returns
# whether it is done, or the weights are stale, or something else is wrong.
infer: Any = None
forward: Any = None
backward: Any = None
weight_gradients: Any = None
pack_backward: Any = None  # returns a number of bytes
gates_bytes: Any = None  # takes the address of a layer
DONE, STALE = 0, 1
is_stalled: Any = None  # takes nothing; whether this thread's scans lately lost more by a team than they gained
_are_as_they_were: Any = None  # of csrc/cpu/weight_samples.h
packings: dict[Key, _Packed] = {}  # what `packed_weights` keeps
_kept: dict[int, _Kept] = {}  # the weights that it was made of, by id
fused_steps = 0  # of optimizers with fused=True, whose writes torch does not count
_loaded = False
_failure: str | None = None


def _forked() -> None:
    """A child may have been forked while another thread compiled, and has no such thread."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_forked)


def load() -> None:
    """Loads the native library, compiling it first if need be (about half a minute, once).

    Raises:
        RuntimeError: there is no library and it cannot be compiled; the message says why.
    """
    global _loaded, _failure, _library, _are_as_they_were
    global infer, forward, backward, weight_gradients, pack_backward, gates_bytes, is_stalled
    if _loaded:
        return
    with _lock:
        if _loaded:
            return
        reason = why_not()
        if reason is not None:
            raise RuntimeError(reason)
        import torch
        from torch.optim.optimizer import register_optimizer_step_post_hook

        try:
            path = _installed() or _compiled()
            try:
                torch.ops.load_library(str(path))
            except OSError as error:
                raise RuntimeError(f"{error}; if it is damaged, delete that file") from error
            _library = torch.library.Library("rnnfast", "FRAGMENT")
            for schema in _SCHEMAS:
                _library.define(schema)
            torch.library.register_fake("rnnfast::direct_empty_cpu", _empty, lib=_library)
            functions = ctypes.CDLL(str(path))
            names = ("infer", "forward", "backward", "weight_gradients", "pack_backward", "gates_bytes")
            infer, forward, backward, weight_gradients, pack_backward, gates_bytes = (
                getattr(functions, f"rnnfast_{name}_cpu") for name in names
            )
            for function in (infer, forward, backward, weight_gradients, pack_backward):
                function.argtypes = [ctypes.c_char_p]
            pack_backward.restype = ctypes.c_int64
            gates_bytes.argtypes = [ctypes.c_void_p]
            is_stalled = functions.rnnfast_is_stalled_cpu
            _are_as_they_were = functions.rnnfast_are_as_they_were
            _are_as_they_were.argtypes = [ctypes.c_void_p]
            register_optimizer_step_post_hook(_count_fused_step)
        except (OSError, RuntimeError, ValueError) as error:
            _failure = f"the native library failed to compile or load: {error}"
            if isinstance(error, OSError) and str(error.filename).startswith(str(building.cache_folder())):
                _failure += "; set RNNFAST_CACHE to a folder that can be written"
            # `auto` goes on without it, and slower, as `explain` tells those who ask.
            note(_failure)
            raise RuntimeError(_failure) from error
        _loaded = True


def _empty(like: Tensor, sizes: list[int]) -> Tensor:
    """`direct_empty_cpu` without memory, for torch's compiler, which compiled autograd shows this function."""
    return like.new_empty(sizes)


def why_not() -> str | None:
    """Returns why the native library is not available and cannot be compiled, or None. Compiles and loads nothing."""
    if _loaded:
        return None
    if _failure is not None:
        return _failure
    if not sys.platform.startswith("linux"):
        return f"the native library is for Linux, this is {sys.platform}"
    if _installed() is not None:
        return None
    if building.sources() is None:
        return "the package was installed without the native library and without its sources"
    if reason := building.why_no_compiler():
        return f"{reason}; with one the library compiles on first use"
    if _ninja() is None:
        return "ninja was not found: pip install ninja, and the library compiles on first use"
    return None


def declines(request: Request) -> str | None:
    """Returns why this backend cannot run a `rnnfast.dispatch.Request`, or None."""
    import torch

    if request.dtype in (torch.float32, torch.float64, torch.bfloat16):
        return None
    return f"it computes in float32, float64 and bfloat16, the weights are {request.dtype}"


class _Packed(NamedTuple):
    stamp: tuple[Any, ...]
    samples: Tensor  # of `weight_samples`
    weights: Tensor
    memory: list[Tensor]  # of the tensors: new ones might else come to lie where they were


class _Kept(NamedTuple):
    """A weight of which packed weights are kept."""

    end: weakref.finalize[..., Any]  # forgets them
    keys: set[Key]  # of `packings`


def _count_fused_step(optimizer: Optimizer, *_: Any) -> None:
    global fused_steps
    import torch

    if not torch.compiler.is_compiling() and any(group.get("fused") for group in optimizer.param_groups):
        fused_steps += 1


def packed_weights(lanes: Sequence[Sequence[Any]], cell: str, ids: bool, extended: bool = False) -> Tensor:
    """Returns a layer's weights packed for `scan_packed`, from the last call's while they have not changed.

    A change is seen by the tensors' version counters and addresses, and by the steps of fused optimizers. Other writes
    that count no version, as those through `.data`, are seen by a sample of each weight, which has all of a bias and of
    a small matrix, and of a large one elements of every unit, gate and column; only one that leaves those as they were
    needs `forget`. Weights in shared memory are compared whole. What is kept goes when a weight does.

    Args:
        lanes: for each direction its w_ih (G*H, I), w_hh (G*H, P), b_ih, b_hh (G*H,) or None, w_hr (P, H) or None.
        cell: "rnn_tanh", "rnn_relu", "lstm" or "gru".
        ids: the input will be token ids.
        extended: packs w_ih, w_hh and w_hr for `rnnfast::scan_extended_cpu` instead.
    """
    lanes = [(*lane[:2], None, None, *lane[4:]) for lane in lanes] if extended else lanes
    tensors = [tensor for lane in lanes for tensor in lane if tensor is not None]
    key = (cell, ids, extended, tuple(map(id, tensors)))
    found = packings.get(key)
    if (
        found is not None
        and found.stamp == (fused_steps, *[(tensor._version, tensor.data_ptr()) for tensor in tensors])
        and all(tensor.is_contiguous() for tensor in tensors)  # and not now a transpose of the same memory
        and _are_as_they_were(found.samples.data_ptr())
    ):
        return found.weights
    return _pack(lanes, cell, ids, extended, key, tensors)


def _pack(
    lanes: Sequence[Sequence[Any]], cell: str, ids: bool, extended: bool, key: Key, tensors: list[Tensor]
) -> Tensor:
    import torch

    load()
    # A tensor made in inference mode has no version, one that is not contiguous no samples: packed again every time.
    is_kept = all(tensor.is_contiguous() and not tensor.is_inference() for tensor in tensors)
    # All of this is read before the weights are packed, so that a write meanwhile is seen later.
    stamp = (fused_steps, *((tensor._version, tensor.data_ptr()) for tensor in tensors)) if is_kept else ()
    units = lanes[0][1].shape[0] // CELLS[cell].gates
    samples = weight_samples(tensors, units) if is_kept else None
    packed: Tensor
    with torch.no_grad():
        stacked = [None if column[0] is None else torch.stack(column) for column in zip(*lanes, strict=True)]
        if extended:
            w_ih, w_hh, _, _, w_hr = stacked
            packed = torch.ops.rnnfast.scan_extended_cpu_pack(w_ih, w_hh, w_hr, cell, ids)
        else:
            packed = torch.ops.rnnfast.scan_cpu_pack(*stacked, cell, ids)
    if samples is None:
        return packed
    for tensor in tensors:
        if id(tensor) not in _kept:
            _kept[id(tensor)] = _Kept(weakref.finalize(tensor, _forget_weight, id(tensor)), set())
        _kept[id(tensor)].keys.add(key)
    packings[key] = _Packed(stamp, samples, packed, [tensor.detach() for tensor in tensors])
    return packed


def _forget_weight(weight: int) -> None:
    """Of the weight of that id, which is gone: other weights of the same layers may live on."""
    kept = _kept.pop(weight, None)
    for key in kept.keys if kept else ():
        packings.pop(key, None)
        for other in key[-1]:
            if other in _kept:
                _kept[other].keys.discard(key)


def forget() -> None:
    """Has all weights packed again when they are needed next; no weak reference to any is left."""
    for weight in list(_kept.values()):
        weight.end.detach()
    _kept.clear()
    packings.clear()


def weight_samples(weights: Sequence[Tensor], units: int) -> Tensor:
    """What tells whether contiguous weights of so many units hold what they do now, while they are where they are."""
    import torch

    load()
    # Another process that writes to shared weights counts no version here, be it under `torch.no_grad()`.
    is_shared = any(weight.is_shared() for weight in weights)
    samples: Tensor = torch.ops.rnnfast.weight_samples_cpu([weight.detach() for weight in weights], units, is_shared)
    return samples


def scan_packed(
    input: Tensor,
    packed: Tensor,
    h_0: Tensor,
    c_0: Tensor | None,
    batch_sizes: Tensor | None = None,
    bidirectional: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The scan without gradients, with weights from `packed_weights`; bitwise equal to `rnnfast.scan.scan`.

    A call costs about five microseconds beyond its arithmetic. Arguments and results are those of `rnnfast.scan.scan`,
    contiguous; input (N, I) or (N,) ids, h_0 (D, B, P), c_0 (D, B, H) or None.
    """
    import torch

    result: tuple[Tensor, Tensor, Tensor] = torch.ops.rnnfast.scan_cpu_packed.default(
        input, packed, h_0, c_0, batch_sizes, bidirectional
    )
    return result


def generate(
    packed: list[Tensor],
    embedding: Tensor | None,
    head_weight: Tensor,
    head_bias: Tensor | None,
    h_0: Tensor,
    c_0: Tensor | None,
    token: int,
    length: int,
    uniforms: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Feeds `token` to L layers and a linear head, picks the next token, feeds that, and so on, all in C++.

    Args:
        packed: for each layer what `packed_weights` returned; the first for ids unless there is an embedding.
        embedding: (V, I) of the weights' dtype, float32 or float64, or None.
        head_weight, head_bias: (V, H), and (V,) or None.
        h_0, c_0: (L, 1, H); c_0 is None but for the LSTM.
        length: tokens to pick.
        uniforms: (length,) float64 in (0, 1], a draw for each token; None: the likeliest token, without a draw.
        temperature, top_k, top_p: what to draw from, as in `rnnfast.lm.generate`.

    Returns:
        The ids (length,), int64, and the states behind all but the last of them: h_n, and c_n, which is empty but for
        the LSTM.

    Raises:
        RuntimeError: parts that do not fit each other, or logits of which none is finite.
    """
    import torch

    result: tuple[Tensor, Tensor, Tensor] = torch.ops.rnnfast.generate_cpu.default(
        packed, embedding, head_weight, head_bias, h_0, c_0, token, length, uniforms, temperature, top_k, top_p
    )
    return result


def compile_library(target: Path) -> None:
    """Compiles csrc/ and puts the library at `target`, in one step, so that no one sees half of it.

    Raises:
        RuntimeError: the compiler failed; the message ends with what it said.
    """
    sources, compiler, ninja = building.sources(), building.compiler(), _ninja()
    torch = importlib.util.find_spec("torch")
    assert sources is not None
    assert ninja is not None
    assert torch is not None
    assert torch.origin is not None
    torch_folder = Path(torch.origin).parent  # its headers; an installation in progress may lack what torch imports
    with building.work_folder(target) as work:
        (work / "build.ninja").write_bytes(os.fsencode(_ninja_file(sources, compiler, torch_folder)))
        # Compilers speak the user's language, and name files, in whatever encoding.
        done = subprocess.run([ninja, "-C", str(work)], capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            reason = building.what_failed(done.stdout + done.stderr)
            raise RuntimeError("; ".join([f"{shlex.join(compiler)} failed", *reason]))
        building.put(work / "library.so", target)


def source_hash() -> str:
    """A hash of csrc/, which names the library that belongs to it."""
    sources = building.sources()
    assert sources is not None
    digest = hashlib.sha256(repr((_FLAGS, _INSTRUCTION_SETS)).encode())
    for path in _source_files(sources):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _ninja_file(sources: Path, compiler: Sequence[str], torch_folder: Path) -> str:
    include = torch_folder / "include"
    instruction_sets, defines = _instruction_sets(compiler)

    def words(*each: object) -> str:  # for the shell, behind ninja's own `$`
        return shlex.join(map(str, each)).replace("$", "$$")

    def path_of(file: Path) -> str:
        return re.sub(r"[$ :]", r"$\g<0>", str(file))

    includes = words("-isystem", include, "-isystem", include / "torch/csrc/api/include")
    lines = [
        f"cc = {words(*compiler)} {_FLAGS} {defines} {includes}",
        "rule compile",
        "  command = $cc $isa -c $in -o $out",
        "rule link",
        f"  command = {words(*compiler)} -shared -fopenmp $in -o $out {words(f'-L{torch_folder}/lib')} -ltorch_cpu",
    ]
    objects = []
    for isa, flags in instruction_sets.items():
        objects.append(f"{isa}.o")
        lines += [
            f"build {isa}.o: compile {path_of(sources / 'cpu/kernels.cpp')}",
            f"  isa = -DRNNFAST_ISA={isa} {flags}",
        ]
    for path in _source_files(sources):
        if path.suffix == ".cpp" and path.name != "kernels.cpp":
            objects.append(f"{path.stem}.o")
            lines.append(f"build {path.stem}.o: compile {path_of(path)}")
    return "\n".join([*lines, f"build library.so: link {' '.join(objects)}", ""])


def _instruction_sets(compiler: Sequence[str]) -> tuple[dict[str, str], str]:
    """The flags of those that the compiler knows, and the macros that tell csrc/cpu/choose.cpp of the newer ones."""
    known = {
        name: flags
        for name, flags in _INSTRUCTION_SETS.items()
        if name not in _NEWER or _accepts(compiler, name, flags)
    }
    return known, " ".join(f"-DRNNFAST_{name.upper()}" for name in _NEWER if name in known)


def _accepts(compiler: Sequence[str], name: str, flags: str) -> bool:
    """Whether the compiler, and the assembler behind it, know an instruction set."""
    command = [*compiler, *flags.split(), "-x", "c++", "-c", "-", "-o", os.devnull]
    code = f'void f() {{ asm("{_NEWER[name]}"); }}'.encode()
    return subprocess.run(command, input=code, capture_output=True, check=False).returncode == 0


def _compiled() -> Path:
    """The library in the cache, compiled now if it is not there."""
    import torch

    name, *words = building.compiler()
    compiler = Path(name).resolve()
    stamp = f"{source_hash()}, {[compiler, *words]}, {compiler.stat().st_mtime_ns}, {torch.__version__}"
    library = building.cache_folder() / hashlib.sha256(stamp.encode()).hexdigest()[:16] / "librnnfast.so"
    if not library.exists():
        with building.one_process(library.parent):
            if not library.exists():
                note(f"compiling the native scan into {library.parent} (once)")
                compile_library(library)
    return library


def _installed() -> Path | None:
    """The library beside the package, if it was compiled from the sources that are there, or there are none."""
    found = sorted(building.PACKAGE.glob("librnnfast-*.so"))
    if not found or building.sources() is None:
        return found[0] if found else None
    wanted = building.PACKAGE / f"librnnfast-{source_hash()}.so"
    return wanted if wanted in found else None


def _source_files(sources: Path) -> list[Path]:
    files = [path for folder in (sources, sources / "cpu") for path in folder.iterdir()]
    return sorted(path for path in files if path.suffix in (".h", ".cpp"))


def _ninja() -> str | None:
    beside_python = Path(sys.executable).parent / "ninja"
    return str(beside_python) if beside_python.exists() else shutil.which("ninja")
