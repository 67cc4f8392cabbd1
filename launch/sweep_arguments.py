"""The arguments of a job's trainings: one set, or one a task of an array. Imports no torch."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from distributed.config import from_command_line
from distributed.config.arguments import from_arguments
from distributed.errors import InputError


def of_task(words: Sequence[str], task: int | None) -> list[str]:
    """What `distributed.train` is to be given by this task of an array; `words` as they are outside an array.

    `@FILE` stands for a line of FILE, by the task's number. Without it the number is the seed, and each has a folder.

    Raises:
        InputError: no such line, or a seed that the array's numbers would override.
    """
    if words and words[0].startswith("@"):
        lines = lines_of(Path(words[0][1:]))
        if task is None or not 0 <= task < len(lines):
            which = "this is no array" if task is None else f"task {task} has no line there"
            raise InputError(f"{words[0]}: {which}; submit it with --array=0-{len(lines) - 1}")
        return [*lines[task], *words[1:]]
    if task is None:
        return list(words)
    given = from_arguments(words[1:] if words and not words[0].startswith("-") else words)
    if "seed" in given.places:
        raise InputError("command line: --seed in an array: the task's number is the seed; remove it, or submit @FILE")
    return with_folder(words, f"seed-{task}", "--seed", str(task))


def with_folder(words: Sequence[str], name: str, *more: str) -> list[str]:
    """These arguments and more, with a folder of that name inside the run folder, and inside the URL of uploads if any."""
    config = from_command_line(words).config
    places = {"run_dir": str(config.run_dir / name)}
    if url := config.checkpoint.upload_to:
        places["checkpoint.upload_to"] = f"{url.rstrip('/')}/{name}"
    kept: list[str] = []
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        setting, equals, _ = word.removeprefix("--").replace("-", "_").partition("=")
        if word.startswith("--") and setting in places:
            if not equals:
                del waiting[:1]
        else:
            kept.append(word)
    return [*kept, *more, *(part for setting, place in places.items() for part in (f"--{setting}", place))]


def lines_of(file: Path) -> list[list[str]]:
    """The arguments on each line of a sweep's file.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return [shlex.split(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError(f"sweep file {file}: {error}; python -m launch.slurm writes such files") from None
