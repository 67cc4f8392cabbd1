"""Saves and resumes a run. A checkpoint is complete or absent, whenever the process dies.

A checkpoint is written by a background thread in a temporary folder, flushed to disk with its manifest last, then
renamed into place; `run.checkpoint_layout` describes the files. The newest state names the best checkpoint, so no
pointer can be out of date. `upload` copies committed checkpoints to a store if the config names one.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from torch import Tensor

from distributed.checkpoint.resume_point import Validate, find_resume_point, load_tensors, mismatch
from distributed.checkpoint.save_budget import SaveBudget
from distributed.checkpoint.snapshot import Snapshot, copy_to_host, load_weights_and_reset_optimizer
from distributed.checkpoint.upload import AT_END_SECONDS, Uploader
from distributed.checkpoint.writer import CheckpointWriter
from distributed.comm import collectives
from distributed.data.sources.identity import check_resumed
from distributed.engine.protocol import Engine
from distributed.errors import InputError, StorageError
from distributed.files import storing
from distributed.run import checkpoint_layout as layout
from distributed.run.claim import UPLOAD_SECONDS, ClaimedRun
from distributed.training.state import TrainState


class Checkpointer:
    """Saves and resumes a run. All ranks call its methods in the same order; only rank 0, which has `run`, writes.

    Args:
        metadata: stored in state.json beside the training state: the config, versions and everything the bits depend on.
        upload_to: URL of a store to which each checkpoint is copied in the background.
        budget: limits the time spent on saves at the ends of epochs. Unlimited by default.
    """

    def __init__(
        self,
        folder: Path,
        run: ClaimedRun | None,
        *,
        keep_last: int,
        metadata: dict[str, Any],
        upload_to: str | None = None,
        budget: SaveBudget | None = None,
    ) -> None:
        self.folder, self.run, self.metadata = folder, run, metadata
        self.upload_to, self._budget = upload_to, budget or SaveBudget(1.0)
        self._uploader = Uploader(upload_to, run, keep_last=keep_last) if upload_to and run else None
        self._writer = CheckpointWriter(run, keep_last=keep_last, uploader=self._uploader) if run else None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._newest = ""
        self._unsaved_best: Snapshot | None = None
        """The best epoch, kept in host memory until the next save because the budget did not allow its own."""

    def resume(
        self, engine: Engine, state: TrainState, *, validate: Validate = lambda *_: None
    ) -> dict[str, Any] | None:
        """Load the newest complete checkpoint into the engine and the state. A collective.

        Args:
            validate: called on rank 0 with the content of state.json and the checkpoint's path; raises InputError if
                the checkpoint is not this run's.

        Returns:
            The content of its state.json, or None if the run has not saved yet.

        Raises:
            InputError: the checkpoint does not fit this run, its data or its network. All ranks raise the same error.
            StorageError: a rank cannot read the checkpoint, or the store cannot be read.
        """

        def validate_all(content: dict[str, Any], path: Path) -> None:
            check_resumed(content, self.metadata, where=path)
            validate(content, path)

        store = self._uploader.store if self._uploader else None
        found = collectives.run_on_main(lambda: find_resume_point(self.run, store, validate_all) if self.run else None)
        if found is None:
            return None
        path = self.folder / found.name
        tensors = collectives.run_on_all(lambda: load_tensors(path))
        try:
            engine.load_state(tensors)
        except ValueError as error:
            raise InputError(mismatch(path, error)) from None
        state.load_state_dict(found.content["state"])
        self._newest = found.name
        collectives.run_on_main(
            lambda: self._writer.finish_commit(found.name, found.content, tensors) if self._writer else None
        )
        if self._uploader:
            self._uploader.start()
        return found.content

    def restore_best(self, engine: Engine, state: TrainState) -> None:
        """Load the best epoch's weights, buffers and EMA, and reset the optimizer. A collective.

        Raises:
            StorageError: the best checkpoint is missing or damaged.
        """
        assert state.best is not None
        if state.best.epoch == state.epoch:  # this epoch is the best, though not by the schedule's min_delta
            tensors = {name: t for name, t in engine.state() if name.startswith(("model.", "ema."))}
        else:
            self._wait_for_save()  # it may be the one that is being written
            if self._unsaved_best:
                self._submit()
            self._wait_for_save()
            path = self.folder / layout.name_of(step=state.best.step, epoch=state.best.epoch + 1)
            if damage := collectives.run_on_main(lambda: self._damage_of(path)):
                raise StorageError(
                    f"{path}: schedule.restore_best_on_drop needs this checkpoint: {damage}; restore it from a copy, or start "
                    "again with another --run_dir"
                )
            tensors = collectives.run_on_all(lambda: load_tensors(path))
        load_weights_and_reset_optimizer(engine, tensors)
        logger.info("restored the weights and buffers of epoch {} and reset the optimizer", state.best.epoch + 1)

    def save(self, engine: Engine, state: TrainState) -> None:
        """Copy the state to host memory, then write it in the background. A collective.

        Waits for the previous save first.

        Raises:
            StorageError: the previous save failed.
        """
        name = layout.name_of(step=state.step, epoch=state.epoch)
        if name == self._newest:
            return
        self._newest = name
        self._wait_for_save()
        tensors = copy_to_host(self._on_main(engine.state()))
        if self.run:
            self._submit(self._snapshot(name, tensors, state))

    def save_epoch(self, engine: Engine, state: TrainState, *, is_best: bool, is_last: bool) -> bool:
        """Save at the end of an epoch if it is the last one or the budget allows it. A collective.

        Otherwise a new best epoch is kept in host memory, to be written by the next save.

        Returns:
            Whether it saved.
        """
        is_idle = self._pending is None or self._pending.done()
        if is_last or collectives.broadcast_object(self._budget.unlimited or (is_idle and self._budget.allows())):
            self.save(engine, state)
            return True
        if is_best:
            tensors = copy_to_host(self._on_main(engine.state()))
            if self.run:
                self._unsaved_best = self._snapshot(layout.name_of(step=state.step, epoch=state.epoch), tensors, state)
        return False

    def wait(self, *, stopping: bool = False) -> None:
        """Wait until all saves are on disk and, up to a time limit, in the store. A collective.

        It is a collective because a launcher would end rank 0 once another rank has exited.

        Raises:
            StorageError: a save failed. Earlier checkpoints are intact.
        """
        self._wait_for_save()
        if self._uploader:
            self._uploader.set_deadline(UPLOAD_SECONDS if stopping else AT_END_SECONDS)
        while self.upload_to and collectives.broadcast_object(self._uploader and self._uploader.wait_a_second()):
            pass
        if self._writer:  # also what was kept only for its upload
            self._writer.delete_old()

    def _damage_of(self, path: Path) -> str | None:
        with storing(path):
            return layout.damage_of(path)

    def _on_main(self, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Iterate on all ranks, because a sharded engine gathers during iteration, but yield only on rank 0."""
        for name, tensor in tensors:
            if self.run:
                yield name, tensor

    def _snapshot(self, name: str, tensors: dict[str, Tensor], state: TrainState) -> Snapshot:
        best = layout.name_of(step=state.best.step, epoch=state.best.epoch + 1) if state.best else None
        return Snapshot(name, tensors, {"format": layout.FORMAT, "state": state.state_dict(), **self.metadata}, best)

    def _submit(self, *snapshots: Snapshot) -> None:
        """Write these in the background, after the unsaved best epoch if there is one."""
        best, self._unsaved_best = self._unsaved_best, None
        if best:
            snapshots = (best, *snapshots)
        copied = torch.cuda.current_stream().record_event() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
        self._pending = self._thread.submit(self._write, snapshots, copied)
        if self.run:
            self.run.save_in_progress = self._pending

    def _wait_for_save(self) -> None:
        """Wait until the previous save is on disk. Ranks wait on the host, because a wait in NCCL could time out."""
        if failure := collectives.broadcast_object(self._save_failure()):
            raise StorageError(failure)

    def _save_failure(self) -> str | None:
        """Wait for the previous save and return why it failed, or None."""
        pending, self._pending = self._pending, None
        try:
            if pending:
                pending.result()
        except StorageError as error:
            return str(error)
        except OSError as error:
            return (
                f"{error.filename2 or error.filename or self.folder}: checkpoint not written: {error.strerror or error}; free "
                "disk space or fix permissions, then rerun the same command: the last complete checkpoint is intact"
            )
        return None

    def _write(self, snapshots: tuple[Snapshot, ...], copied: torch.cuda.Event | None) -> None:
        assert self._writer is not None
        with self._budget.spending():
            if copied:
                copied.synchronize()
            for snapshot in snapshots:
                self._writer.write(snapshot)
