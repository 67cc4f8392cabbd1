"""The checks of one step: each has a verdict of its own and is printed at once, so that a crash loses none before it."""

import json
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

PREFIX = "CHECK "
"""How a line begins that holds a check's result as JSON, for the process that started the step."""


@dataclass(frozen=True)
class Checks:
    """What a step is given: the device, the sizes, a folder that is removed afterwards, and one for what is to be kept.

    `tiny` asks for shapes so small that every step ends within seconds on two CPU cores.
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
        """Run the body as one check; it fills in figures and fails by `assert`. A failure never ends the step.

        Yields:
            A dict for figures, JSON values only, that are recorded whatever the verdict.
        """
        figures: dict[str, Any] = {}
        verdict, message = "pass", ""
        start = time.monotonic()
        try:
            yield figures
        except AssertionError as error:
            verdict, message = "fail", str(error) or traceback.format_exc(limit=-2)
        except Exception:
            verdict, message = "error", traceback.format_exc(limit=-6)
        record = {"check": name, "verdict": verdict, "seconds": round(time.monotonic() - start, 2), "figures": figures}
        if message:
            record["message"] = message[-2000:]
        print(PREFIX + json.dumps(record), flush=True)
        if message:
            print(message, file=sys.stderr, flush=True)

    def synchronize(self) -> None:
        """Wait for the device, so that a clock may be read."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)
