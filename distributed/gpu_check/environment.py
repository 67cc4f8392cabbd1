"""Step 0: describes this machine, and checks that every required package can be imported."""

import importlib
import os
import subprocess
import time
from contextlib import suppress

import torch

from distributed.gpu_check.checks import Checks
from distributed.host.cpu_quota import available_cpus
from distributed.host.versions import versions

_MODULES = ("pydantic", "loguru", "tomli_w", "greenlet", "safetensors", "filelock", "tqdm", "numpy", "matplotlib")


def run(checks: Checks) -> None:
    with checks.check("versions") as figures:
        figures |= versions()
        figures["cores"] = available_cpus()
    with checks.check("imports"):
        for module in (*_MODULES, "distributed.recipe", "distributed.run_process", "torchvision"):
            importlib.import_module(module)
    with checks.check("device") as figures:
        if checks.is_cuda:
            properties = torch.cuda.get_device_properties(checks.device)
            figures["name"], figures["multiprocessors"] = properties.name, properties.multi_processor_count
            figures["capability"] = f"{properties.major}.{properties.minor}"
            figures["memory_gib"] = round(properties.total_memory / 2**30, 1)
            figures["cudnn"], figures["cuda"] = torch.backends.cudnn.version(), torch.version.cuda  # type: ignore[no-untyped-call]
            figures["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
            query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.max.sm", "--format=csv,noheader"]
            with suppress(OSError, subprocess.TimeoutExpired):  # some containers lack it
                answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
                figures["driver, clock, maximum clock"] = answer.stdout.strip()
    with checks.check("disk") as figures:
        start = time.monotonic()
        with (checks.scratch / "file").open("wb") as file:
            file.write(os.urandom(2**20) * (1 if checks.tiny else 64))
            file.flush()
            os.fsync(file.fileno())
        figures["mib_per_second"] = (1 if checks.tiny else 64) / (time.monotonic() - start)
