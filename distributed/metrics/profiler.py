"""Profiles a few training steps: a trace for https://ui.perfetto.dev and a table of the slowest operations."""

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from loguru import logger

from distributed.process.optional_output import OptionalOutput

_WARM_UP_STEPS = 10  # not profiled: caches fill and libraries choose kernels


class StepProfiler:
    """Profiles some steps of an attempt after ten warm-up steps. Context manager.

    Args:
        steps: number of steps to profile; 0 disables the profiler.
        folder: receives `trace.json` and `table.txt`.
        check: called before they are written; raises OSError if the folder no longer belongs to this attempt.
    """

    def __init__(self, steps: int, folder: Path, check: Callable[[], None]) -> None:
        self.steps, self.folder, self._check = steps, folder, check
        self._done = 0
        self._profile: Any = None
        self._output = OptionalOutput(folder)

    def __enter__(self) -> Self:
        return self

    def step(self) -> None:
        """Call after each step, on the thread that ran it."""
        if not self.steps:
            return
        self._done += 1
        if self._done == _WARM_UP_STEPS:
            self._output.run(self._begin)
        elif self._done == _WARM_UP_STEPS + self.steps:
            self._output.run(self._end)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._output.run(self._end)  # the attempt ended before the last profiled step
        if error is None and self._done <= _WARM_UP_STEPS and self.steps:
            logger.warning(
                "logging.profile_steps = {}: no profile; the attempt took only {} steps, and the first {} are not profiled",
                self.steps, self._done, _WARM_UP_STEPS,
            )  # fmt: skip

    def _begin(self) -> None:
        from torch.profiler import profile  # slow to import

        self._profile = profile()
        self._profile.__enter__()

    def _end(self) -> None:
        running = self._profile
        if running is None:
            return
        self._profile = None
        running.__exit__(None, None, None)
        steps = self._done - _WARM_UP_STEPS
        if not steps:
            return
        self._check()
        self.folder.mkdir(exist_ok=True)
        running.export_chrome_trace(str(self.folder / "trace.json"))
        averages = running.key_averages()
        by = "self_device_time_total" if any(a.self_device_time_total for a in averages) else "self_cpu_time_total"
        (self.folder / "table.txt").write_text(averages.table(sort_by=by, row_limit=40, max_name_column_width=60))
        logger.info("profile of {} steps in {}: table.txt, and trace.json for ui.perfetto.dev", steps, self.folder)
