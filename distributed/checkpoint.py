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

import json
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from loguru import logger
from torch import Tensor

from distributed import collectives
from distributed.checkpoint_files import FORMAT, best_in, checkpoints, damage_of, name_of, point, retain, sweep
from distributed.downloads import fetch_newest
from distributed.engine.protocol import Engine
from distributed.errors import InputError, StorageError
from distributed.files import append_line, digest_of, read_json, read_object, replace_json, sync_folder
from distributed.remote import StoreError
from distributed.run_folder import ClaimedRun
from distributed.safetensors_stream import digest_of_tensor, tensors_of, write_tensors
from distributed.state import TrainState
from distributed.uploads import AT_END_SECONDS, AT_STOP_SECONDS, Uploads


class Checkpointer:
    """Saves and restores a run. All ranks call it alike; rank 0, which has `run`, writes.

    Args:
        facts: what else `state.json` should hold: the config, versions, what bits depend on.
        upload_to: URL of a store that gets each checkpoint too, in the background.
    """

    def __init__(
        self,
        folder: Path,
        run: ClaimedRun | None,
        *,
        keep_last: int,
        facts: dict[str, Any],
        upload_to: str | None = None,
    ) -> None:
        self.folder, self.run, self.keep_last, self.facts = folder, run, keep_last, facts
        self.upload_to = upload_to
        self._uploads = Uploads(upload_to, run, keep_last=keep_last) if upload_to and run else None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._newest = ""

    def restore(self, engine: Engine, state: TrainState) -> dict[str, Any] | None:
        """Load the newest checkpoint that is whole; the content of its state.json, None where there is none.
        Damaged ones are set aside, loudly. Where the folder has none, the store's newest is fetched.

        Raises:
            StorageError: a rank cannot see what rank 0 found, or the store does not give what it has.
            InputError: that is whole, and not of this run.
        """
        name = collectives.from_main((self._newest_whole() or self._fetched()) if self.run else None)
        if name is None:
            return None
        path = self.folder / name
        if not path.is_dir():
            raise StorageError(
                f"{path}: rank 0 sees this checkpoint and this rank does not; run_dir must be shared storage"
            )
        try:
            content = load(path, engine, state)
        except ValueError as error:
            raise InputError(f"{path}: {error}; move it away, or give another --run_dir") from None
        self._newest = name
        if self._uploads:
            self._uploads.offer()
        return content

    def return_to_best(self, engine: Engine, state: TrainState) -> None:
        """Put the best epoch's weights and buffers in place, the optimizer as at the start; a collective.

        Raises:
            StorageError: that checkpoint is not there any more, or damaged.
        """
        assert state.best is not None
        if state.best.epoch == state.epoch:  # better than all before, though not by min_delta
            tensors = dict(engine.state())
        else:
            self._written()  # it may be the one that is being written
            path = self.folder / name_of(step=state.best.step, epoch=state.best.epoch + 1)
            if damage := collectives.from_main(damage_of(path) if self.run else None):
                raise StorageError(f"{path}: the best checkpoint, to return to at a drop, is damaged: {damage}")
            tensors = tensors_of(path)
        engine.load_state({name: tensor for name, tensor in tensors.items() if name.startswith(("model.", "ema."))})
        logger.info("weights and buffers are those of epoch {}, the optimizer begins anew", state.best.epoch + 1)

    def save(self, engine: Engine, state: TrainState) -> None:
        """Take a copy of everything now and write it in the background, after the save before is done.

        Raises:
            StorageError: that one could not be written.
        """
        name = name_of(step=state.step, epoch=state.epoch)
        if name == self._newest:
            return
        self._newest = name
        self._written()
        # All ranks go through it: a sharded engine puts each tensor together then, and only rank 0 keeps it.
        tensors = {}
        for tensor_name, tensor in engine.state():
            if self.run:
                tensors[tensor_name] = tensor.detach().to("cpu", copy=True)
        if self.run is None:
            return
        content = {"format": FORMAT, "state": state.state_dict(), **self.facts}
        best = name_of(step=state.best.step, epoch=state.best.epoch + 1) if state.best else None
        self._pending = self._thread.submit(self._write, name, tensors, content, best)

    def wait(self, *, stopping: bool = False) -> None:
        """Return once everything handed to `save` is on the disk, and in the store if that does not take too long. A
        collective: a peer that left earlier would have its launcher end rank 0.

        Raises:
            StorageError: it could not be written, with the reason; earlier checkpoints are intact.
        """
        self._written()
        if self._uploads:
            self._uploads.begin_ending(AT_STOP_SECONDS if stopping else AT_END_SECONDS)
        while self.upload_to and collectives.from_main(self._uploads and self._uploads.is_busy()):
            pass
        if self._uploads and (there := checkpoints(self.folder)):  # what an upload had held back may go
            kept = {best_in(read_object(there[-1] / "state.json")), self._uploads.holds}
            retain(self.folder, keep_last=self.keep_last, kept=kept)

    def _written(self) -> None:
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except StorageError:
            raise
        except OSError as error:
            raise StorageError(
                f"{error.filename2 or error.filename or self.folder}: checkpoint not written: {error.strerror or error}; free "
                "space or mend access, then give the same command again: the last complete checkpoint is intact"
            ) from error

    def _write(self, name: str, tensors: dict[str, Tensor], content: dict[str, Any], best: str | None) -> None:
        assert self.run is not None
        aside = self.folder / f".writing-{name}"
        try:
            write_checkpoint(aside, tensors, content)
            commit(aside, self.folder / name, self.run)
        except OSError:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        digests = {tensor: digest_of_tensor(value) for tensor, value in tensors.items()}
        append_line(self.run.digests_file, json.dumps({"name": name, "tensors": digests}))
        point(self.folder, "latest", name)
        if best is not None:
            point(self.folder, "best", best)
        retain(self.folder, keep_last=self.keep_last, kept={best, self._uploads.holds if self._uploads else None})
        if self._uploads:
            self._uploads.offer()
        self.run.progress(step=content["state"]["step"], epoch=content["state"]["epoch"])

    def _newest_whole(self) -> str | None:
        sweep(self.folder)
        for path in reversed(checkpoints(self.folder)):
            damage = damage_of(path)
            if damage is None:
                return path.name
            logger.error(
                "{} is damaged ({}): set aside as {}.damaged; going back to the one before", path, damage, path.name
            )
            shutil.rmtree(path.with_name(f"{path.name}.damaged"), ignore_errors=True)
            path.rename(path.with_name(f"{path.name}.damaged"))
        return None

    def _fetched(self) -> str | None:
        if self._uploads is None or self.run is None:
            return None
        try:
            return fetch_newest(self._uploads.store, self.folder, partial(commit, run=self.run))
        except StoreError as error:
            raise StorageError(f"{error}; nothing was begun: then give the same command again") from error


def load(path: Path, engine: Engine, state: TrainState | None = None) -> dict[str, Any]:
    """Put a checkpoint's tensors into the engine and its counters into the state; the content of its state.json.

    Raises:
        ValueError: they do not fit, or were never such.
    """
    content = read_json(path / "state.json")
    if not isinstance(content, dict):
        raise ValueError("state.json is no object")
    if odd := [name for name in ("state", "config", "bits") if not isinstance(content.get(name, {}), dict)]:
        raise ValueError(f"{' and '.join(odd)} in state.json: of another version")
    engine.load_state(tensors_of(path))
    try:
        if state is not None:
            state.load_state_dict(content["state"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"state.json is of another version: {type(error).__name__}: {error}") from None
    return content


def write_checkpoint(aside: Path, tensors: dict[str, Tensor], content: dict[str, Any]) -> None:
    """All files of a checkpoint, the manifest last, each on the disk before the next."""
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    files = {"tensors.safetensors": write_tensors(aside / "tensors.safetensors", tensors)}
    replace_json(aside / "state.json", content)
    files["state.json"] = digest_of(aside / "state.json")
    replace_json(aside / "manifest.json", {"format": FORMAT, "files": files})


def commit(aside: Path, path: Path, run: ClaimedRun) -> None:
    """Rename into place, if the run folder is still this attempt's."""
    run.check_ours()
    os.rename(aside, path)
    sync_folder(path.parent)
