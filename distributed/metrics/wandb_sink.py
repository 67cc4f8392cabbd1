"""Logs to Weights & Biases, online or into a folder.

wandb starts a service process of its own (a new program, not a copy of this one) and only hands it the values; the service
keeps them in RUN/wandb and sends them from there. So only the start and the end of a run can wait for the server.
"""

import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from loguru import logger

from distributed.config.sinks import Wandb
from distributed.errors import InputError
from distributed.metrics.follower import Logged, RefusedError, Status, values_of
from distributed.metrics.wandb_file import logged_in
from distributed.process.optional_output import one_line
from distributed.run.folder import RunFolder
from distributed.run.metrics_file import MetricsRecord

_START_SECONDS = 60.0
_FINISH_SECONDS = 4.0  # less than a run waits for it, so that the folder with the rest can be named
_LONGEST_NAME = 128  # of a run, which a sweep's folder may exceed
_EXIT_CODE = {"finished": 0, "stopped": 75, "failed": 1}


def check_credentials(config: Wandb) -> None:
    """Raise InputError if wandb has no API key, or one that cannot be right. Asks neither the server nor the user."""
    import wandb

    try:
        # WANDB_MODE would overrule the config, and be reported as a missing key.
        wandb.setup(settings=wandb.Settings(silent=True, mode=config.mode))
        has_key = config.mode == "offline" or wandb.login(prompt=False, verify=False)
    except Exception as error:  # wandb raises errors of its own
        raise InputError(
            f"logging.wandb: {one_line(error)}; correct WANDB_API_KEY or the other WANDB_ variables, or set "
            "logging.wandb.mode = offline"
        ) from None
    if not has_key:
        raise InputError(
            "logging.wandb.mode = online needs an API key: run `wandb login`, set WANDB_API_KEY, or set "
            "logging.wandb.mode = offline"
        )


class WandbService:
    """A `Service`: one wandb run, whose id is the run's identity.

    If the server does not answer at the start, this attempt is recorded in a folder, for `wandb sync`.

    Args:
        identity: the same in all attempts at the run.
        parameters: settings by dotted name.
    """

    def __init__(
        self, config: Wandb, run_dir: Path, *, identity: str, parameters: Mapping[str, str | int | float | bool]
    ) -> None:
        self._config, self._folder, self._identity, self._parameters = config, run_dir.resolve(), identity, parameters
        self._run: Any = None

    def start(self) -> Logged:
        import wandb

        # Later than the next line: a file of this attempt would be found too.
        logged = logged_in(self._folder / "wandb", self._identity)
        if self._config.mode == "online":
            try:
                self._run = self._init("online")
            except Exception as error:
                with suppress(Exception, SystemExit):  # it exits if its service has died
                    wandb.teardown()  # its service would not start another run with this id
                self._run = self._init("offline")
                logger.warning(
                    "wandb: {}; this attempt is recorded in {}; send it later with: wandb sync {}",
                    one_line(error), self._run.settings.sync_dir, shlex.quote(self._run.settings.sync_dir),
                )  # fmt: skip
            else:
                logger.info("wandb: {}", self._run.url)
                return Logged(self._run.starting_step - 1, int(self._run.summary.get("epoch") or 0))
        else:
            self._run = self._init("offline")
            logger.info("wandb: {}", self._run.settings.sync_dir)
        return logged

    def _init(self, mode: Literal["online", "offline"]) -> Any:
        import wandb

        settings = wandb.Settings(
            silent=True, console="off", disable_git=True, save_code=False, init_timeout=_START_SECONDS,
            finish_timeout=_FINISH_SECONDS, finish_timeout_raises=True, reinit="create_new",
        )  # fmt: skip
        config = self._config
        name = config.name or RunFolder(self._folder).name[-_LONGEST_NAME:]
        return wandb.init(
            project=config.project, entity=config.entity, name=name, tags=config.tags or None,
            id=self._identity, resume="allow", mode=mode, dir=str(self._folder), config=dict(self._parameters),
            settings=settings,
        )  # fmt: skip

    def log(self, records: Sequence[MetricsRecord]) -> None:
        for record in records:
            # An epoch whose last step was already sent by an earlier attempt: wandb ignores steps before its newest.
            self._run.log(values_of(record), step=max(record.step, self._run.step))

    def finish(self, status: Status) -> None:
        self._run.summary["status"] = status
        if status == "stopped":
            self._run.mark_preempting()
        try:
            self._run.finish(exit_code=_EXIT_CODE[status])
        except TimeoutError:
            folder = shlex.quote(self._run.settings.sync_dir)
            raise RefusedError(
                f"the server has not taken everything; send the rest with: wandb sync {folder}"
            ) from None
