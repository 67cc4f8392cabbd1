"""When a run's checkpoints go to the store that `checkpoint.upload_to` names. Imports no torch.

A thread of its own beside the one that writes them: a slow store or one that is away delays no step and no save. What it
lacks of what retention keeps goes up, the newest first; what failed is tried again at the next save.
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
from distributed.run.checkpoint_layout import best_in, checkpoints
from distributed.run.claim import ClaimedRun
from distributed.run.folder import RunFolder
from distributed.topology import host

AT_STOP_SECONDS = 60.0  # of the 120 between Slurm's warning and its time limit
AT_END_SECONDS = 600.0


class Uploads:
    """The upload of one run's checkpoints; rank 0 has it.

    Attributes:
        store: where they go.
        holds: the checkpoint that is being read, which must stay until it is up.
        problem: why the store lacks the newest, in a line; empty where it has it.
    """

    def __init__(self, url: str, run: ClaimedRun, *, keep_last: int) -> None:
        self.run, self.keep_last = run, keep_last
        self.holds = self.problem = ""
        self.store = Store(url)
        self._token = ""
        self._lock = threading.Lock()
        self._asked = False
        self._thread: threading.Thread | None = None
        self._deadline = 0.0

    def offer(self) -> None:
        """Have the thread look at what the store lacks. Returns at once."""
        with self._lock:
            self._asked = True
            if self._thread is None:
                # Nobody waits for a daemon at the exit: a store that hangs holds no process.
                self._thread = threading.Thread(target=self._work, name="upload", daemon=True)
                self._thread.start()

    def begin_ending(self, seconds: float) -> None:
        """The run ends: try once more what failed, for so long at most."""
        self._deadline = time.monotonic() + seconds
        if self.problem:
            self.offer()

    def is_busy(self) -> bool:
        """Wait a second at most; whether something is still going up and the time of `begin_ending` not over."""
        thread = self._thread
        if thread is None:
            return False
        thread.join(max(0.0, min(1.0, self._deadline - time.monotonic())))
        if thread.is_alive() and time.monotonic() >= self._deadline:
            self._tell(f"{self.store.url}: the newest checkpoint was not up in time")
            return False
        return thread.is_alive()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._asked:
                    self._thread = None
                    return
                self._asked = False
            try:
                self._bring_up()
            except (StoreError, InputError, StorageError) as error:
                self._tell(str(error))
            except Exception as error:  # never training's
                self._tell(f"{self.store.url}: {type(error).__name__}: {error}")
            else:
                self._tell("")

    def _bring_up(self) -> None:
        tried: set[str] = set()
        while (path := next(self._lacking(tried), None)) is not None:
            tried.add(path.name)
            self._upload(path)
        try:
            self._retain()
        except StoreError as error:  # what is wanted is up
            logger.warning("an old checkpoint was not deleted: {}; the next save tries again", error)

    def _wanted(self) -> list[Path]:
        """What retention keeps here, the newest first."""
        there = checkpoints(self.run.checkpoints)[::-1]
        best = best_in(read_object(there[0] / "state.json")) if there else None
        return [path for index, path in enumerate(there) if index < self.keep_last or path.name == best]

    def _lacking(self, tried: set[str]) -> Iterator[Path]:
        for path in self._wanted():
            with suppress(FileNotFoundError):  # retention was here
                if path.name not in tried and not self.store.has(path):
                    yield path

    def _upload(self, path: Path) -> None:
        self._check_ours()
        self.holds = path.name
        began = time.monotonic()
        try:
            self.store.upload(path)
            if not self.store.has(path):
                raise StoreError(f"{self.store.url}: {path.name} arrived with other sizes; look at the store's space")
        except (StoreError, FileNotFoundError):
            if path.is_dir():
                raise
            return  # retention was faster than `holds`; a newer one is there
        finally:
            self.holds = ""
        logger.debug("{} is up at {} after {:.1f} s", path.name, self.store.url, time.monotonic() - began)

    def _retain(self) -> None:
        """Remove what the rule of the run folder would remove, and what a killed upload left."""
        wanted = self._wanted()
        if not wanted:
            return
        names = self.store.names()
        newest = [name for name in names if self.store.is_whole(name)][-self.keep_last :]
        best = best_in(read_object(wanted[0] / "state.json"))
        gone = [name for name in names if name not in (*newest, best) and name not in [path.name for path in wanted]]
        if gone:
            self._check_ours()
        for name in gone:
            self.store.remove(name)

    def _check_ours(self) -> None:
        self.run.check_token()
        if not self._token:
            token = uuid.uuid4().hex
            self.store.claim({"token": token, "host": host(), "run_dir": str(self.run.path.absolute())})
            self._token = token
            return
        holder = self.store.holder()
        if holder and holder.get("token") != self._token:
            raise StoreError(
                f"{self.store.url}: taken over by the run in {holder.get('run_dir')} on {holder.get('host')}, which began "
                "later; give each run its own --checkpoint.upload_to"
            )

    def _tell(self, problem: str) -> None:
        self.problem = problem
        if problem:
            logger.warning("not uploaded: {}; training does not wait for it, and the next save tries again", problem)
        newest = checkpoints(self.run.checkpoints)[-1:]
        with suppress(OSError):
            content = {"to": self.store.url, "newest": newest[0].name if newest else "", "problem": problem}
            content["time"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            self.run.replace(self.run.upload_file, json.dumps(content, indent=1) + "\n")


def upload_rest(config: TrainConfig) -> None:
    """Bring up what the store still lacks of a run that is finished."""
    if not config.checkpoint.upload_to:
        return
    try:
        run = ClaimedRun.claim(config.run_dir, world_size=1)
    except InputError as error:
        logger.warning("not uploaded: {}", error)
    else:
        rest = Uploads(config.checkpoint.upload_to, run, keep_last=config.checkpoint.keep_last)
        rest.offer()
        rest.begin_ending(AT_END_SECONDS)
        while rest.is_busy():
            pass
        run.release()
    tell_ending(config)


def tell_ending(config: TrainConfig) -> None:
    """The last word on a run's uploads: that the newest checkpoint is up, or loudly that it is not."""
    run, url = RunFolder(config.run_dir), config.checkpoint.upload_to
    if url is None:
        return
    said = read_object(run.upload_file)
    newest = next((path.name for path in checkpoints(run.checkpoints)[::-1]), "none")
    if said.get("to") == url.rstrip("/") and said.get("newest") == newest and not said.get("problem"):
        logger.info("{} is uploaded to {}", newest, url)
    else:
        logger.error(
            "NOT UPLOADED: {} lies in {} alone: {}; fix that, and the same command uploads it",
            newest, run.checkpoints, said.get("problem") or f"{url} was not reached",
        )  # fmt: skip
