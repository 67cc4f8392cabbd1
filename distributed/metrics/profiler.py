"""A few steps of an attempt under torch's profiler: a trace for https://ui.perfetto.dev and a table of what took longest."""

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from loguru import logger

from distributed.process.optional_output import OptionalOutput

_FIRST = 10  # steps left alone before: caches fill, libraries choose their kernels


class StepProfiler:
    """Counts steps, and profiles so many of them after the first ten.

    Args:
        steps: 0 for none at all.
        folder: where `trace.json` and `table.txt` go.
        check: asked before they are written; an OSError if the folder is not this attempt's any more.
    """

    def __init__(self, steps: int, folder: Path, check: Callable[[], None]) -> None:
        self.steps, self.folder, self._check = steps, folder, check
        self._done = 0
        self._profile: Any = None
        self._output = OptionalOutput(folder)

    def __enter__(self) -> Self:
        return self

    def step_done(self) -> None:
        """Tell of each step, on the thread that took it."""
        if not self.steps:
            return
        self._done += 1
        if self._done == _FIRST:
            self._output.run(self._begin)
        elif self._done == _FIRST + self.steps:
            self._output.run(self._end)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._output.run(self._end)  # an attempt that was shorter

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
        self._check()
        self.folder.mkdir(exist_ok=True)
        running.export_chrome_trace(str(self.folder / "trace.json"))
        averages = running.key_averages()
        by = "self_device_time_total" if any(a.self_device_time_total for a in averages) else "self_cpu_time_total"
        (self.folder / "table.txt").write_text(averages.table(sort_by=by, row_limit=40, max_name_column_width=60))
        logger.info("profile of {} steps in {}: table.txt, and trace.json for ui.perfetto.dev", self.steps, self.folder)
