"""Modules that the fork server of `kit.ranks` imports before it forks ranks. None may start a thread or touch a GPU."""

import contextlib
import gc
import os
import sys
from importlib.util import find_spec

import pytest  # noqa: F401
import torch

with contextlib.redirect_stdout(None):
    import torch._dynamo

    import distributed.recipe  # noqa: F401
    from distributed.data.sources import synthetic

    synthetic._noise_tiles()
    if find_spec("torchvision"):
        import torchvision.models  # noqa: F401

    # DeepSpeed looks for a GPU when it is imported, after which a process cannot fork.
    if not torch.cuda.is_available() and find_spec("deepspeed"):
        # It imports mlflow if that is installed, and that starts a thread.
        sys.modules["mlflow"] = None  # type: ignore[assignment]
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401

        del sys.modules["mlflow"]

assert len(os.listdir("/proc/self/task")) == 1, "only one thread survives a fork"
gc.freeze()  # what is loaded here is not garbage of the ranks
