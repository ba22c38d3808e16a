"""The tests. Without a GPU, Triton's kernels run in its interpreter, which it asks for when it is first imported."""

import importlib.util
import os

import torch

if not torch.cuda.is_available() and importlib.util.find_spec("numpy") is not None:  # the interpreter is NumPy
    os.environ["TRITON_INTERPRET"] = "1"
