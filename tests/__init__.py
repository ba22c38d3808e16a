"""The tests. Without a GPU, Triton's kernels run in its interpreter, which it asks for when it is first imported."""

import importlib.util
import os

# torch's threads, which outnumber the cores where several processes run the tests, would spin in wait for one another.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is imported

import torch

if not torch.cuda.is_available() and importlib.util.find_spec("numpy") is not None:  # the interpreter is NumPy
    os.environ["TRITON_INTERPRET"] = "1"
