"""The checks of a step. Each has its own verdict and is printed at once, so a crash loses no earlier check."""

import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from distributed.gpu_check.records import CheckResult


@dataclass(frozen=True)
class Checks:
    """The context a step runs in.

    Args:
        tiny: use shapes so small that every step takes seconds on two CPU cores.
        scratch: folder that is removed after the step.
        out: folder for files to keep.
    """

    device: torch.device
    tiny: bool
    scratch: Path
    out: Path

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @contextmanager
    def check(self, name: str) -> Iterator[dict[str, Any]]:
        """Run the body as one check, which fails by `assert`. A failure does not end the step.

        Yields:
            A dict for the body to fill with figures (JSON values), which are recorded whatever the verdict.
        """
        figures: dict[str, Any] = {}
        verdict: Literal["pass", "fail", "error"] = "pass"
        message = ""
        start = time.monotonic()
        try:
            yield figures
        except AssertionError as error:
            verdict, message = "fail", str(error) or traceback.format_exc(limit=-2)
        except Exception:
            verdict, message = "error", traceback.format_exc(limit=-6)
        seconds = round(time.monotonic() - start, 2)
        print(CheckResult(name, verdict, seconds, figures, message[-2000:]).to_line(), flush=True)
        if message:
            print(message, file=sys.stderr, flush=True)

    def synchronize(self) -> None:
        """Wait for the device, so that the clock can be read."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)
