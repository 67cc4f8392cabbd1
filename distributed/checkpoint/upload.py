"""Uploads a run's checkpoints to the store that `checkpoint.upload_to` names. Imports no torch.

Uploads run in their own thread, so a slow or unavailable store delays neither steps nor saves. The thread uploads the
checkpoints that retention keeps and the store lacks, first the best one, then newest first. The next save retries what
failed.
"""

import json
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from loguru import logger

from distributed.checkpoint.object_store import Store, StoreError
from distributed.config import TrainConfig
from distributed.errors import InputError, StorageError
from distributed.files import read_object
from distributed.host.identity import host
from distributed.run.checkpoint_layout import best_known_to, checkpoints
from distributed.run.claim import ClaimedRun
from distributed.run.folder import RunFolder

AT_END_SECONDS = 600.0


class Uploader:
    """Uploads the checkpoints of one run. Only rank 0 has one.

    Attributes:
        store: the destination.
        uploading: name of the checkpoint being read, which retention must keep; empty if there is none.
        problem: why the store lacks the newest checkpoint, in one line; empty if it has it.
    """

    def __init__(self, url: str, run: ClaimedRun, *, keep_last: int) -> None:
        self.run, self.keep_last = run, keep_last
        self.uploading = self.problem = ""
        self.store = Store(url)
        self._token = ""
        self._lock = threading.Lock()
        self._requested = False
        self._thread: threading.Thread | None = None
        self._deadline = 0.0

    def start(self) -> None:
        """Upload in the background what the store lacks."""
        with self._lock:
            self._requested = True
            if self._thread is None or not self._thread.is_alive():
                # A daemon, so that a hanging store does not keep the process alive.
                self._thread = threading.Thread(target=self._work, name="upload", daemon=True)
                self._thread.start()

    def set_deadline(self, seconds: float) -> None:
        """Set the deadline for the last uploads of this attempt, and retry what failed."""
        self._deadline = time.monotonic() + seconds
        if self.problem:
            self.start()

    def wait_a_second(self) -> bool:
        """Wait up to a second. Returns whether an upload is still running before the deadline."""
        thread = self._thread
        if thread is None:
            return False
        thread.join(max(0.0, min(1.0, self._deadline - time.monotonic())))
        if thread.is_alive() and time.monotonic() >= self._deadline:
            self._report(f"{self.store.url}: the newest checkpoint was not uploaded in time")
            return False
        return thread.is_alive()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._requested:
                    self._thread = None
                    return
                self._requested = False
            try:
                newest = self._upload_missing()
            except (StoreError, InputError, StorageError) as error:
                self._report(str(error))
            except Exception as error:  # an upload must never end training
                self._report(f"{self.store.url}: {type(error).__name__}: {error}")
            else:
                self._report("", newest)

    def _upload_missing(self) -> str:
        """Upload what the store lacks, and remove what it need not keep. Return the name of the newest checkpoint it has."""
        tried: set[str] = set()
        retained = self._retained()
        while (path := next(self._missing(retained, tried), None)) is not None:
            tried.add(path.name)
            self._upload(path)
            retained = self._retained()
        try:
            self._remove_old()
        except StoreError as error:  # all uploads succeeded
            logger.warning("an old checkpoint was not deleted: {}; the next save tries again", error)
        return retained[0].name if retained else ""

    def _retained(self) -> list[Path]:
        """Return the local checkpoints that retention keeps, newest first."""
        paths = checkpoints(self.run.checkpoints)[::-1]
        best = best_known_to(paths[0]) if paths else None
        return [path for index, path in enumerate(paths) if index < self.keep_last or path.name == best]

    def _missing(self, retained: list[Path], tried: set[str]) -> Iterator[Path]:
        """Yield those that the store lacks: first the best one, which a resume from the newest one needs."""
        best = best_known_to(retained[0]) if retained else None
        for path in sorted(retained, key=lambda path: path.name != best):
            with suppress(FileNotFoundError):  # deleted by retention in the meantime
                if path.name not in tried and not self.store.has(path):
                    yield path

    def _upload(self, path: Path) -> None:
        self._check_token()
        self.uploading = path.name
        start = time.monotonic()
        try:
            self.store.upload(path)
            if not self.store.has(path):
                raise StoreError(
                    f"{self.store.url}: {path.name} has the wrong size after its upload; check the store's free space"
                )
        except (StoreError, FileNotFoundError):
            if path.is_dir():
                raise
            return  # retention deleted it before `uploading` was set, so there is a newer one
        finally:
            self.uploading = ""
        logger.debug("uploaded {} to {} in {:.1f} s", path.name, self.store.url, time.monotonic() - start)

    def _remove_old(self) -> None:
        """Remove what retention would delete in the run folder, and the remains of interrupted uploads."""
        retained = self._retained()
        if not retained:
            return
        names = self.store.names()
        newest = [name for name in names if self.store.is_committed(name)][-self.keep_last :]
        keep = {*newest, best_known_to(retained[0]), *(path.name for path in retained)}
        old = [name for name in names if name not in keep]
        if old:
            self._check_token()
        for name in old:
            self.store.remove(name)

    def _check_token(self) -> None:
        """Claim the store at the first call; later raise StoreError if another run has claimed it since."""
        self.run.check_token()
        if not self._token:
            token = uuid.uuid4().hex
            self.store.claim({"token": token, "host": host(), "run_dir": str(self.run.path.absolute())})
            self._token = token
            return
        holder = self.store.holder()
        if holder and holder.get("token") != self._token:
            raise StoreError(
                f"{self.store.url}: taken over by the run in {holder.get('run_dir')} on {holder.get('host')}, which started "
                "later; give each run its own --checkpoint.upload_to"
            )

    def _report(self, problem: str, newest: str = "") -> None:
        """Log the problem, if any, and write upload.json.

        Args:
            newest: the newest checkpoint that the store has; default: the newest in the run folder.
        """
        self.problem = problem
        if problem:
            logger.warning("not uploaded: {}; training continues, and the next save tries again", problem)
        with suppress(OSError):
            newest = newest or next((path.name for path in checkpoints(self.run.checkpoints)[::-1]), "")
            content = {"to": self.store.url, "newest": newest, "problem": problem}
            content["time"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            self.run.replace(self.run.upload_file, json.dumps(content, indent=1) + "\n")


def upload_remaining(config: TrainConfig) -> None:
    """Upload what the store still lacks of a finished run."""
    if not config.checkpoint.upload_to:
        return
    try:
        run = ClaimedRun.claim(config.run_dir, world_size=1)
    except InputError as error:
        logger.warning("not uploaded: {}", error)
    else:
        uploader = Uploader(config.checkpoint.upload_to, run, keep_last=config.checkpoint.keep_last)
        uploader.start()
        uploader.set_deadline(AT_END_SECONDS)
        while uploader.wait_a_second():
            pass
        run.release()
    log_upload_result(config)


def log_upload_result(config: TrainConfig) -> None:
    """Log whether the newest checkpoint was uploaded; an error if it was not."""
    run, url = RunFolder(config.run_dir), config.checkpoint.upload_to
    if url is None:
        return
    uploaded = read_object(run.upload_file)
    newest = next((path.name for path in checkpoints(run.checkpoints)[::-1]), "none")
    if uploaded.get("to") == url.rstrip("/") and uploaded.get("newest") == newest and not uploaded.get("problem"):
        logger.info("{} has been uploaded to {}", newest, url)
    else:
        logger.error(
            "NOT UPLOADED: {} is only in {}: {}; fix that, and the same command uploads it",
            newest, run.checkpoints, uploaded.get("problem") or f"{url} was not reached",
        )  # fmt: skip
