"""Writes a run's checkpoints, records their digests, sets the links and deletes old checkpoints."""

import os
import shutil
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from distributed.checkpoint.snapshot import Snapshot, write_checkpoint
from distributed.checkpoint.tensor_file import tensor_digest
from distributed.checkpoint.upload import Uploader
from distributed.run import checkpoint_changes
from distributed.run import checkpoint_layout as layout
from distributed.run.claim import ClaimedRun
from distributed.run.records import SaveRecord, read_saves


class CheckpointWriter:
    """Writes checkpoints into the folder of a claimed run. Only rank 0 has one.

    Args:
        uploader: starts an upload after each write.
    """

    def __init__(self, run: ClaimedRun, *, keep_last: int, uploader: Uploader | None) -> None:
        self.run, self.keep_last, self._uploader = run, keep_last, uploader
        self._newest = ""
        self._best: str | None = None

    def write(self, snapshot: Snapshot) -> None:
        """Write a checkpoint, which is complete or absent whenever the process dies.

        Raises:
            OSError: it could not be written; earlier ones are intact. StorageError: another attempt has the folder.
        """
        name, folder = snapshot.name, self.run.checkpoints
        path, aside = folder / name, layout.unfinished(folder, name, token=self.run.token)
        try:
            self.run.check_token()
            write_checkpoint(aside, snapshot.tensors, snapshot.content)
            if os.path.lexists(path):  # e.g. a copy made in the meantime
                checkpoint_changes.set_aside(path, "not written by this attempt")
            self.run.commit(aside, path)
        except OSError:
            shutil.rmtree(aside, ignore_errors=True)
            self.run.check_token()  # its message says more if the run folder was removed
            raise
        self._link(name, snapshot.best)
        self._record(name, snapshot.tensors)  # after the links, because digests of large tensors take seconds
        self.delete_old()
        if self._uploader:
            self._uploader.start()
        self.run.saved(step=snapshot.content["state"]["step"], epoch=snapshot.content["state"]["epoch"])

    def finish_commit(self, name: str, content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Finish what an attempt left undone that was killed right after it committed this checkpoint.

        It may have been the run's last save, so no later one would do it.
        """
        self._link(name, layout.best_name(content))
        if all(save.name != name for save in read_saves(self.run.digests_file)):
            self._record(name, tensors)

    def delete_old(self) -> None:
        """Delete checkpoints that retention does not keep, and that are not being uploaded."""
        keep = {self._best, self._uploader.uploading if self._uploader else None}
        delete = partial(
            checkpoint_changes.delete_old,
            self.run.checkpoints,
            newest=self._newest,
            keep_last=self.keep_last,
            keep=keep,
        )
        if self._newest:
            self.run.try_cleanup("an old checkpoint was not deleted", delete)

    def _record(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Append the digests of a checkpoint's tensors, which outlive it."""
        digests = {tensor: tensor_digest(value) for tensor, value in tensors.items()}
        self.run.append(self.run.digests_file, SaveRecord(name=name, tensors=digests))

    def _link(self, newest: str, best: str | None) -> None:
        """Point the links to the newest and the best checkpoint."""
        self._newest, self._best = newest, best
        set_link = partial(checkpoint_changes.set_link, self.run.checkpoints)
        self.run.try_cleanup("the link latest was not set", partial(set_link, layout.LATEST, newest))
        if best is not None:
            self.run.try_cleanup("the link best was not set", partial(set_link, layout.BEST, best))
