"""Compiles the native library where torch and a compiler are there; everything else is in pyproject.toml."""

import importlib.util
import shutil
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
spec = importlib.util.spec_from_file_location("native", ROOT / "rnnfast/backends/native.py")
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)


class BuildPython(build_py):
    """Ships csrc/ within the package, to be compiled on first use where it was not at installation."""

    def run(self):
        super().run()
        if not self.editable_mode:
            shutil.copytree(ROOT / "csrc", Path(self.build_lib) / "rnnfast/csrc", dirs_exist_ok=True)


class BuildNative(build_ext):
    def get_ext_filename(self, name):
        # Asked for the full name, rnnfast.librnnfast, and for its last part alone.
        return str(Path(*name.split(".")[:-1], f"librnnfast-{native.source_hash()}.so"))

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name))
        if target.exists():
            return
        try:
            native.compile_library(target)
        except RuntimeError as error:
            self.warn(f"the native library was not compiled; it will be tried again on first use: {error}")


can_compile = importlib.util.find_spec("torch") is not None and native.why_not() is None
setup(
    ext_modules=[Extension("rnnfast.librnnfast", [], optional=True)] if can_compile else [],
    cmdclass={"build_py": BuildPython, "build_ext": BuildNative},
)
