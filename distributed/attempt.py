"""One attempt at a run: it claims the run folder, says on what it runs and what changed, and writes down how it ended."""

import json
from importlib import metadata
from types import TracebackType
from typing import Any, Self

import torch
from loguru import logger

from distributed.comm import collectives
from distributed.config import TrainConfig
from distributed.config.engines import DeepSpeed
from distributed.errors import ExitCode, InputError, StorageError
from distributed.figures.curves import draw_curves
from distributed.files import storing
from distributed.host.versions import versions
from distributed.process import exits, logs
from distributed.process.optional_output import OptionalOutput
from distributed.run.claim import ClaimedRun
from distributed.run.folder import RunFolder
from distributed.topology import Topology
from distributed.training.determinism import joined, kernels
from distributed.training.state import TrainState


class Attempt:
    """A context around a run. `run` is the claimed folder on rank 0, None on the other ranks."""

    def __init__(self, config: TrainConfig, topology: Topology) -> None:
        self.config, self.topology = config, topology
        self.folder = RunFolder(config.run_dir)
        self.run: ClaimedRun | None = None
        self._state: TrainState | None = None
        self._log: int | None = None

    def __enter__(self) -> Self:
        if self.topology.is_main:
            self.run = ClaimedRun.claim(self.config.run_dir, world_size=self.topology.world_size)
            exits.add_exit_hook(self._end_at_once)
        return self

    def _end_at_once(self, ending: exits.Exit) -> None:
        """Write down the ending of a process that does not come back here; nothing, if nothing was begun."""
        if self.run is not None and self._state is not None:
            self.run.end(
                "stopped" if ending.is_stop else "failed",
                exit_code=ending.code, reason=ending.reason, step=self._state.step, epoch=self._state.epoch,
            )  # fmt: skip

    def check_ours(self) -> None:
        """Raises StorageError on rank 0 once the run folder is another attempt's."""
        if self.run:
            self.run.check_ours()

    def open_log(self) -> None:
        """This rank's log file; after rank 0 has made the folder."""
        self._log = logs.file_logs(self.folder.logs, self.topology.rank)

    def facts(self, device: torch.device) -> dict[str, Any]:
        """Metadata of a checkpoint: the config and everything that the bits depend on. A collective.

        Raises:
            InputError: exact.shards was set explicitly, and the ranks' hardware or libraries differ.
        """
        bits: dict[str, Any] = {
            "shards": self.config.shards_on(device.type),
            "versions": versions(),
        }
        together, differences = joined(collectives.gather_objects(kernels(device)))
        self._report(differences)
        bits |= together
        if not bits["shards"]:
            engine = self.config.engine
            more = (
                f" {metadata.version('deepspeed')}, stage {engine.zero_stage}" if isinstance(engine, DeepSpeed) else ""
            )
            bits["world_size"] = self.topology.world_size
            if device.type == "cpu":
                bits["threads"] = torch.get_num_threads()
            bits["engine"] = f"{engine.name}{more}"
        return {"data": self.config.data.name, "config": json.loads(self.config.model_dump_json()), "bits": bits}

    def _report(self, differences: list[str]) -> None:
        """Refuse or warn if ranks differ in what selects their kernels."""
        if differences and self.config.exact.shards not in ("auto", 0):
            raise InputError(
                *[f"exact.shards = {self.config.exact.shards}, but ranks differ in {line}" for line in differences],
                "exact mode needs identical nodes: use such nodes, or set --exact.shards 0",
            )
        for line in differences if self.topology.is_main else ():
            logger.warning("ranks differ in {}; results depend on the placement of ranks", line)

    def begin(self, state: TrainState, *, resumed_from: dict[str, Any] | None, facts: dict[str, Any]) -> None:
        """From here on progress is the state's.

        Raises:
            InputError: the run was begun with another number of shards.
        """
        self._state = state
        if resumed_from:
            self._compare(resumed_from.get("bits", {}), facts["bits"])
        if self.run:
            self.run.begin(
                self.config, start_step=state.step, details={"bits": facts["bits"], "images": facts["images"]}
            )

    def _compare(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        if (shards := before.get("shards", 0)) != now["shards"]:
            remedy = f"give --exact.shards {shards}" + (
                " and --engine.name ddp or fsdp" if shards and self.config.engine.name == "deepspeed" else ""
            )
            raise InputError(
                f"{self.folder.path}: exact.shards = {now['shards']} here (auto depends on device and engine), and this run "
                f"was begun with {shards}; {remedy}, or another --run_dir"
            )
        recorded = "instructions" in before or "compute capability" in before  # checkpoints of older versions say less
        for name in {**before, **now}:
            old, new = before.get(name, "not set"), now.get(name, "not set")
            comparable = name in before or (recorded and name.isupper())  # a variable; all else is always recorded
            if old != new and comparable:
                logger.warning("resuming with another {}: {} before, {} now; bits may differ", name, old, new)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self.run is not None:
            exits.remove_exit_hook(self._end_at_once)
        try:
            if self.run is not None:
                with storing(self.run.path):
                    self._write_ending(self.run, error)
        except StorageError as failure:
            if error is None:
                raise
            # The error of a folder that is full, removed or another's says as much.
            level = "DEBUG" if isinstance(error, StorageError) else "WARNING"
            logger.log(level, "the ending was not written: {}", failure)
        finally:
            if self.run is not None:
                self.run.release()
            if self._log is not None:
                logger.remove(self._log)

    def _write_ending(self, run: ClaimedRun, error: BaseException | None) -> None:
        state = self._state
        progress: dict[str, Any] = {"step": state.step, "epoch": state.epoch} if state else {}
        if error is not None:
            code = getattr(error, "exit_code", ExitCode.FAILED)
            ending = exits.Exit(code, str(error))  # a request to stop that another rank met is one, too
            reason = ending.reason if ending.is_stop else f"{type(error).__name__}: {error}"
            run.end("stopped" if ending.is_stop else "failed", exit_code=code, reason=reason, **progress)
        elif state and state.stop_reason:
            run.end("stopped", exit_code=ExitCode.STOPPED, reason=state.stop_reason, **progress)
        else:
            run.end("finished", exit_code=ExitCode.FINISHED, **progress)
            with OptionalOutput(run.curves):
                draw_curves(run.metrics_file, run.curves, title=f"{self.config.model.name} on {self.config.data.name}")
