"""`distributed.train`, which kills itself (kill -9) at a given point of rank 0's first save after step N.

python -m kit.killed_in_save POINT STEP [arguments of distributed.train]
"""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distributed.checkpoint import checkpointer, snapshot, tensor_file
from distributed.run import checkpoint_changes, checkpoint_layout, claim

POINTS = ("after 5 tensors", "before the manifest", "before the rename", "before the pointer", "during retention")


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(point: str) -> None:
    """Replace the function that runs next at this point by `die`."""
    if point == "after 5 tensors":
        original = tensor_file._bytes_of
        written = iter(range(5))

        def bytes_of(tensor: Any) -> Any:
            return original(tensor) if next(written, None) is not None else die()

        tensor_file._bytes_of = bytes_of
    elif point == "before the manifest":
        replace_json = snapshot.replace_json

        def replace(path: Path, value: Any) -> None:
            die() if path.name == checkpoint_layout.MANIFEST else replace_json(path, value)

        snapshot.replace_json = replace
    elif point == "before the rename":
        claim.ClaimedRun.commit = die  # type: ignore[method-assign]
    elif point == "before the pointer":
        checkpoint_changes.set_link = die
    elif point == "during retention":
        shutil.rmtree = lambda path, **_: die() if ".deleting-" in str(path) else None
    else:
        raise ValueError(f"unknown point {point!r}; choose one of {POINTS}")


def main() -> None:
    point, step = sys.argv[1], int(sys.argv[2])
    del sys.argv[1:3]
    save: Callable[..., None] = checkpointer.Checkpointer.save

    def armed_save(self: Any, engine: Any, state: Any) -> None:
        if self.run and state.step > step:
            arm(point)
        save(self, engine, state)

    checkpointer.Checkpointer.save = armed_save  # type: ignore[method-assign]
    from distributed.train import main as train_main

    os._exit(train_main())


if __name__ == "__main__":
    main()
