"""Compiles the native libraries where torch and the compilers are there; everything else is in pyproject.toml."""

import importlib.util
import shutil
import sys
import types
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
# The package's own __init__ imports torch, which an installation in progress may not be able to; these have none.
for name in ("rnnfast", "rnnfast.backends", "rnnfast.backends.cpu", "rnnfast.backends.cuda"):
    package = sys.modules[name] = types.ModuleType(name)
    package.__path__ = [str(ROOT.joinpath(*name.split(".")))]

from rnnfast.backends.cpu import build as cpu  # noqa: E402
from rnnfast.backends.cuda import build as cuda  # noqa: E402

CUDA_ARCHITECTURES = cuda.named_architectures() or cuda.DEFAULT_ARCHITECTURES


class BuildPython(build_py):
    """Ships csrc/ within the package, to be compiled on first use where it was not at installation."""

    def run(self):
        package = Path(self.build_lib, "rnnfast")
        if not self.editable_mode:
            # Else what is left of an earlier build is shipped, too: files that are gone, libraries of other sources.
            name_of = self.get_finalized_command("build_ext").get_ext_filename
            libraries = {Path(name_of(extension.name)).name for extension in extensions}
            for path in package.rglob("*"):
                if path.is_file() and path.name not in libraries:
                    path.unlink()
        super().run()
        if not self.editable_mode:
            shutil.copytree(ROOT / "csrc", package / "csrc", dirs_exist_ok=True)


class BuildNative(build_ext):
    def get_ext_filename(self, name):
        # Asked for the full name, rnnfast.librnnfast, and for its last part alone.
        *folders, stem = name.split(".")
        file = cpu.installed_name() if stem == "librnnfast" else cuda.installed_name(CUDA_ARCHITECTURES)
        return str(Path(*folders, file))

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name))
        if target.exists():
            return
        try:
            if ext.name == "rnnfast.librnnfast":
                cpu.compile_library(target, cpu.ALL)
            else:
                cuda.compile_library(target, CUDA_ARCHITECTURES)
        except (OSError, RuntimeError) as error:
            self.warn(f"{target.name} was not compiled; it will be tried again on first use: {error}")


class Wheel(bdist_wheel):
    """The libraries use the stable ABIs of torch and of Python: one wheel serves all versions."""

    def get_tag(self):
        *_, platform = super().get_tag()
        return "py3", "none", platform


extensions = []
if importlib.util.find_spec("torch") is not None:
    if cpu.why_not() is None:
        extensions.append(Extension("rnnfast.librnnfast", [], optional=True))
    else:
        print(f"rnnfast: the native scan is not compiled now: {cpu.why_not()}", file=sys.stderr)
# A toolkit and a torch for CUDA are what it takes; a GPU need not be here, where the package is built.
if cuda.torch_cuda() is not None and cuda.why_not_compile() is None:
    extensions.append(Extension("rnnfast.librnnfast_cuda", [], optional=True))
setup(ext_modules=extensions, cmdclass={"build_py": BuildPython, "build_ext": BuildNative, "bdist_wheel": Wheel})
