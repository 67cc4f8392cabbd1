"""Checkpoints that are complete or absent.

    checkpoints/step-00000313-epoch-001/    after 313 steps and one finished epoch
        tensors.safetensors                 every tensor by its canonical name
        state.json                          counters, schedule, config, versions
        manifest.json                       sizes and digests; written last
    checkpoints/latest, best                links for people; a restore never trusts them

A checkpoint is written aside by a thread while training goes on, flushed to the disk, its manifest last, and renamed
into place. Which one is best stands in the newest state itself, so no pointer can be out of date. `uploads` copies what
is in place to a store, if the config names one.
"""

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from torch import Tensor

from distributed.checkpoint.resume_point import Check, find_resume_point, not_ours, tensors_at
from distributed.checkpoint.save_budget import SaveBudget
from distributed.checkpoint.snapshot import Snapshot, to_host, write_checkpoint
from distributed.checkpoint.tensor_file import digest_of_tensor
from distributed.checkpoint.upload import AT_END_SECONDS, AT_STOP_SECONDS, Uploads
from distributed.comm import collectives
from distributed.data.sources.identity import check_resumed
from distributed.engine.protocol import Engine
from distributed.errors import InputError, StorageError
from distributed.files import read_object
from distributed.run.checkpoint_layout import FORMAT, best_in, damage_of, name_of, point, retain, set_aside
from distributed.run.claim import ClaimedRun
from distributed.training.state import TrainState


class Checkpointer:
    """Saves and restores a run. All ranks call it alike; rank 0, which has `run`, writes.

    Args:
        facts: what else `state.json` should hold: the config, versions, what bits depend on.
        upload_to: URL of a store that gets each checkpoint too, in the background.
        budget: what saves at the ends of epochs may take; every save if not given.
    """

    def __init__(
        self,
        folder: Path,
        run: ClaimedRun | None,
        *,
        keep_last: int,
        facts: dict[str, Any],
        upload_to: str | None = None,
        budget: SaveBudget | None = None,
    ) -> None:
        self.folder, self.run, self.keep_last, self.facts = folder, run, keep_last, facts
        self.upload_to, self._budget = upload_to, budget or SaveBudget(1.0)
        self._uploads = Uploads(upload_to, run, keep_last=keep_last) if upload_to and run else None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._newest = ""
        self._best: Snapshot | None = None
        """The best epoch, kept in host memory until the next save: its own was not affordable."""

    def restore(self, engine: Engine, state: TrainState, *, check: Check = lambda *_: None) -> dict[str, Any] | None:
        """Load the newest complete checkpoint; the content of its state.json, None if the run has saved none yet.
        All ranks raise the same error, so that none waits for another.

        Raises:
            StorageError, InputError: as `find_resume_point`, it was trained on other data, or a rank cannot read it.
        """

        def fits(content: dict[str, Any], path: Path) -> None:
            check_resumed(content, self.facts, where=path)
            check(content, path)

        store = self._uploads.store if self._uploads else None
        found = collectives.run_on_main(lambda: find_resume_point(self.run, store, fits) if self.run else None)
        if found is None:
            return None
        name, content = found
        path = self.folder / name
        tensors = collectives.run_on_all(lambda: tensors_at(path))
        try:
            engine.load_state(tensors)
        except ValueError as error:
            raise InputError(not_ours(path, error)) from None
        state.load_state_dict(content["state"])
        self._newest = name
        if self._uploads:
            self._uploads.offer()
        return content

    def restore_best(self, engine: Engine, state: TrainState) -> None:
        """Put the best epoch's weights and buffers in place, the optimizer as at the start; a collective.

        Raises:
            StorageError: that checkpoint is not there any more, or damaged.
        """
        assert state.best is not None
        if state.best.epoch == state.epoch:  # better than all before, though not by min_delta
            tensors = dict(engine.state())
        else:
            self._written()  # it may be the one that is being written
            if self._best:
                self._submit()
            self._written()
            path = self.folder / name_of(step=state.best.step, epoch=state.best.epoch + 1)
            if damage := collectives.broadcast_object(damage_of(path) if self.run else None):
                raise StorageError(f"{path}: the best checkpoint, to return to at a drop, is damaged: {damage}")
            tensors = collectives.run_on_all(lambda: tensors_at(path))
        engine.load_state({name: tensor for name, tensor in tensors.items() if name.startswith(("model.", "ema."))})
        logger.info("weights and buffers are those of epoch {}, the optimizer begins anew", state.best.epoch + 1)

    def save(self, engine: Engine, state: TrainState) -> None:
        """Copy the state now and write it in the background once the previous save is done. A collective.

        Raises:
            StorageError: that one could not be written.
        """
        name = name_of(step=state.step, epoch=state.epoch)
        if name == self._newest:
            return
        self._newest = name
        self._written()
        tensors = to_host(self._on_main(engine.state()))
        if self.run:
            self._submit(self._snapshot(name, tensors, state))

    def save_epoch(self, engine: Engine, state: TrainState, *, is_best: bool, ends: bool) -> bool:
        """Save at the end of an epoch if the run ends or the budget allows it; whether it did. A collective.

        Otherwise a new best is kept in host memory, for the next save to write.
        """
        idle = self._pending is None or self._pending.done()
        if ends or collectives.broadcast_object(self._budget.unlimited or (idle and self._budget.allows())):
            self.save(engine, state)
            return True
        if is_best:
            tensors = to_host(self._on_main(engine.state()))
            if self.run:
                self._best = self._snapshot(name_of(step=state.step, epoch=state.epoch), tensors, state)
        return False

    def _on_main(self, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Iterates on all ranks, since a sharded engine gathers on access; only rank 0 yields tensors."""
        for name, tensor in tensors:
            if self.run:
                yield name, tensor

    def _snapshot(self, name: str, tensors: dict[str, Tensor], state: TrainState) -> Snapshot:
        best = name_of(step=state.best.step, epoch=state.best.epoch + 1) if state.best else None
        return Snapshot(name, tensors, {"format": FORMAT, "state": state.state_dict(), **self.facts}, best)

    def _submit(self, *snapshots: Snapshot) -> None:
        """Write these in the background, after the best epoch if that is still waiting."""
        best, self._best = self._best, None
        if best:
            snapshots = (best, *snapshots)
        copied = torch.cuda.current_stream().record_event() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
        self._pending = self._thread.submit(self._write, snapshots, copied)

    def wait(self, *, stopping: bool = False) -> None:
        """Return once everything handed to `save` is on the disk, and in the store if that does not take too long. A
        collective: a peer that left earlier would have its launcher end rank 0.

        Raises:
            StorageError: it could not be written, with the reason; earlier checkpoints are intact.
        """
        self._written()
        if self._uploads:
            self._uploads.begin_ending(AT_STOP_SECONDS if stopping else AT_END_SECONDS)
        while self.upload_to and collectives.broadcast_object(self._uploads and self._uploads.is_busy()):
            pass
        if self._uploads and self._newest:  # what an upload had held back may go
            self._retain(self._newest, best_in(read_object(self.folder / self._newest / "state.json")))

    def _written(self) -> None:
        """Wait until the previous save is on disk. A collective on the host, so that peers do not wait in NCCL."""
        if failure := collectives.broadcast_object(self._failure()):
            raise StorageError(failure)

    def _failure(self) -> str | None:
        """Why the previous save failed, after waiting for it; None if it did not."""
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
        with self._budget.spending():
            if copied:
                copied.synchronize()
            for snapshot in snapshots:
                self._write_one(snapshot)

    def _write_one(self, snapshot: Snapshot) -> None:
        assert self.run is not None
        name, tensors = snapshot.name, snapshot.tensors
        aside = self.folder / f".writing-{name}-{self.run.token[:8]}"  # a superseded attempt must not write into ours
        try:
            self.run.check_ours()
            write_checkpoint(aside, tensors, snapshot.content)
            if os.path.lexists(self.folder / name):  # e.g. a copy made meanwhile
                set_aside(self.folder / name, "not written by this attempt")
            self.run.commit(aside, self.folder / name)
        except OSError:
            shutil.rmtree(aside, ignore_errors=True)
            self.run.check_ours()  # of a folder that was removed this says more
            raise
        digests = {tensor: digest_of_tensor(value) for tensor, value in tensors.items()}
        self.run.append(self.run.digests_file, {"name": name, "tensors": digests})
        self.run.tidy("the link latest was not set", partial(point, self.folder, "latest", name))
        if snapshot.best is not None:
            self.run.tidy("the link best was not set", partial(point, self.folder, "best", snapshot.best))
        self._retain(name, snapshot.best)
        if self._uploads:
            self._uploads.offer()
        self.run.saved(step=snapshot.content["state"]["step"], epoch=snapshot.content["state"]["epoch"])

    def _retain(self, newest: str, best: str | None) -> None:
        assert self.run is not None
        kept = {best, self._uploads.holds if self._uploads else None}
        delete = partial(retain, self.folder, newest=newest, keep_last=self.keep_last, kept=kept)
        self.run.tidy("an old checkpoint was not deleted", delete)
