"""The tests. Without a GPU, Triton's kernels run in its interpreter, which it asks for when it is first imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
