"""One attempt at a run: claims the run folder and records the environment, changes to it, and how the attempt ended."""

import json
from contextlib import suppress
from importlib.metadata import version
from types import TracebackType
from typing import Any, Self

import torch
from loguru import logger

from distributed.comm import collectives
from distributed.config import TrainConfig
from distributed.config.engines import DeepSpeed
from distributed.engine.ddp import DdpEngine
from distributed.engine.protocol import Engine
from distributed.errors import ExitCode, InputError, StorageError
from distributed.figures.curves import draw_curves
from distributed.files import storing
from distributed.host.importable import ModuleFile, changed_modules, module_files
from distributed.host.versions import versions
from distributed.process import exits, logs
from distributed.process.optional_output import OptionalOutput
from distributed.run.claim import ClaimedRun
from distributed.run.folder import RunFolder
from distributed.topology import Topology
from distributed.training.determinism import kernel_metadata, merge_metadata
from distributed.training.state import TrainState


class Attempt:
    """Context manager around one attempt. `run` is the claimed folder on rank 0 and None on the other ranks."""

    def __init__(self, config: TrainConfig, topology: Topology) -> None:
        self.config, self.topology = config, topology
        self.folder = RunFolder(config.run_dir)
        self.run: ClaimedRun | None = None
        self._state: TrainState | None = None
        self._log: int | None = None

    def __enter__(self) -> Self:
        if self.topology.is_main:
            self.run = ClaimedRun.claim(
                self.config.run_dir,
                world_size=self.topology.world_size,
                uploads=self.config.checkpoint.upload_to is not None,
            )
            exits.add_exit_hook(self._record_sudden_ending)
        return self

    def _record_sudden_ending(self, ending: exits.Exit) -> None:
        """Record the ending of a process that exits without returning here, if the attempt has started."""
        if self.run is not None and self._state is not None:
            if ending.finishes_save:
                self.run.finish_save()
            self.run.end(
                ending.status, exit_code=ending.code, reason=ending.reason, step=self._state.step, epoch=self._state.epoch,
            )  # fmt: skip

    def check_token(self) -> None:
        """Raise StorageError on rank 0 if the run folder now belongs to another attempt."""
        if self.run:
            self.run.check_token()

    def open_log(self) -> None:
        """Open this rank's log file. Call it after rank 0 has created the run folder."""
        self._log = logs.file_logs(self.folder.logs, self.topology.rank)

    def metadata(self, device: torch.device, engine: Engine) -> dict[str, Any]:
        """Collect the metadata of a checkpoint: the config and everything its bits depend on. A collective.

        Raises:
            InputError: exact.shards was set explicitly, and the ranks' hardware or libraries differ.
        """
        bits: dict[str, Any] = {"shards": self.config.shards_on(device.type), "versions": versions()}
        threads = {"threads": str(torch.get_num_threads())} if device.type == "cpu" and not bits["shards"] else {}
        kernels_of, others_of = zip(
            *collectives.gather_objects((kernel_metadata(device), versions() | threads)), strict=True
        )
        kernels, differences = merge_metadata(kernels_of)
        self._check_differences([*differences, *merge_metadata(others_of).differences])
        bits |= kernels
        if not bits["shards"]:
            section = self.config.engine
            bits["world_size"] = self.topology.world_size
            if device.type == "cpu":
                bits["threads"] = torch.get_num_threads()
            bits["engine"] = section.name
            if isinstance(section, DeepSpeed) and self.topology.world_size > 1:  # else it is not used
                bits["engine"] += f" {version('deepspeed')}, stage {section.zero_stage}"
            if isinstance(engine, DdpEngine) and engine.summed_by:
                bits["sum of gradients"] = engine.summed_by
        modules = {name: file._asdict() for name, file in module_files(self.config.import_paths).items()}
        saved_config = json.loads(self.config.model_dump_json())
        return {"data": self.config.data.name, "config": saved_config, "bits": bits, "modules": modules}

    def _check_differences(self, differences: list[str]) -> None:
        """Raise or warn if the ranks differ in hardware, libraries or variables that select kernels."""
        if differences and self.config.exact.shards not in ("auto", 0):
            raise InputError(
                *[f"exact.shards = {self.config.exact.shards}, but ranks differ in {line}" for line in differences],
                "exact mode needs identical nodes: use nodes of one type, or set --exact.shards 0",
            )
        for line in differences if self.topology.is_main else ():
            logger.warning("ranks differ in {}; results depend on which rank runs where", line)

    def begin(
        self, state: TrainState, *, resumed_from: dict[str, Any] | None, metadata: dict[str, Any]
    ) -> dict[str, Any]:
        """Record the start of this attempt, and return the run's identity, for the metadata of its checkpoints.

        From here on its progress is read from `state`.

        Raises:
            InputError: the run was started with a different number of shards.
        """
        self._state = state
        if resumed_from:
            self._compare_bits(resumed_from.get("bits", {}), metadata["bits"])
            self._compare_modules(resumed_from.get("modules"), metadata["modules"])
        if self.run is None:
            return {}
        identity = self.run.identify((resumed_from or {}).get("run"), self.config)
        recorded = {name: metadata[name] for name in ("bits", "images", "modules")}
        self.run.begin(self.config, start_step=state.step, **recorded)
        return {"run": identity}

    def _compare_bits(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        """Raise if the number of shards changed; warn about every other change that the bits depend on."""
        if (shards := before.get("shards", 0)) != now["shards"]:
            remedy = f"give --exact.shards {shards}" + (
                " and --engine.name ddp or fsdp" if shards and self.config.engine.name == "deepspeed" else ""
            )
            raise InputError(
                f"{self.folder.path}: exact.shards = {now['shards']} here (auto depends on device and engine), and this run "
                f"was started with {shards}; {remedy}, or another --run_dir"
            )
        # Checkpoints of older versions record fewer keys, and a variable that was not set has none.
        records_variables = "instructions" in before or "compute capability" in before
        for name in {**before, **now} if self.topology.is_main else ():
            old, new = before.get(name, "not set"), now.get(name, "not set")
            is_recorded = name in before or (records_variables and name.isupper())
            if old != new and is_recorded:
                logger.warning("resuming with a different {}: {} before, {} now; bits may differ", name, old, new)

    def _compare_modules(self, before: Any, now: dict[str, dict[str, str]]) -> None:
        """Warn on rank 0 about every imported module whose file has changed since the checkpoint."""
        if not self.topology.is_main:
            return
        files = {name: ModuleFile(**file) for name, file in now.items()}
        for module in changed_modules(before, files):
            logger.warning(
                "{} has changed since the checkpoint: sha256 {} before, {} now; unless only comments changed, results "
                "differ from those of an undisturbed run", *module,
            )  # fmt: skip

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if self.run is not None:
                try:
                    self.run.finish_save()
                finally:
                    exits.remove_exit_hook(self._record_sudden_ending)
                with storing(self.run.path):
                    self._record_ending(self.run, error)
        except StorageError as failure:
            if error is None:
                raise
            # If the attempt itself ended with a StorageError, that error already says what is wrong with the folder.
            level = "DEBUG" if isinstance(error, StorageError) else "WARNING"
            logger.log(level, "the ending was not recorded: {}", failure)
        finally:
            if self.run is not None:
                self.run.release()
            if self._log is not None:
                with suppress(ValueError):  # the program may have removed all handlers
                    logger.remove(self._log)

    def _record_ending(self, run: ClaimedRun, error: BaseException | None) -> None:
        state = self._state
        progress: dict[str, Any] = {"step": state.step, "epoch": state.epoch} if state else {}
        if error is not None:
            ending = exits.exit_of(error)
            reason = ending.reason if ending.is_stop else f"{type(error).__name__}: {error}"
            # An attempt that was refused leaves a finished run finished.
            keep = isinstance(error, InputError) and state is None and run.status().status == "finished"
            run.end(ending.status, exit_code=ending.code, reason=reason, keep_status=keep, **progress)
        elif state and state.stop_reason:
            run.end("stopped", exit_code=ExitCode.STOPPED, reason=state.stop_reason, **progress)
        else:
            run.end("finished", exit_code=ExitCode.FINISHED, **progress)
            if self.config.logging.curves:
                with OptionalOutput(run.curves):
                    draw_curves(
                        run.metrics_file, run.curves, title=f"{self.config.model.name} on {self.config.data.name}"
                    )
