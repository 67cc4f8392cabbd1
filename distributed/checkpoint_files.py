"""A checkpoint as it lies on the disk: its name, its files, whether it is whole. Imports no torch."""

from pathlib import Path

from distributed.files import digest_of, read_object

FORMAT = 1
FILES = ("tensors.safetensors", "state.json")
MANIFEST = "manifest.json"


def name_of(*, step: int, epoch: int) -> str:
    """After so many steps and finished epochs. An epoch's end has the steps of its last step, but knows more."""
    return f"step-{step:08d}-epoch-{epoch:03d}"


def checkpoints(folder: Path) -> list[Path]:
    """The committed checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir() and not path.suffix)


def damage_of(path: Path) -> str | None:
    """What is wrong with a checkpoint, by its manifest; None where it is whole."""
    manifest = read_object(path / MANIFEST)
    files = manifest.get("files")
    if not isinstance(files, dict) or manifest.get("format") != FORMAT or set(files) != set(FILES):
        return "no manifest of a known format"
    for name, expected in files.items():
        try:
            found = digest_of(path / name)
        except OSError as error:
            return f"{name}: {error.strerror}"
        if list(found) != expected:
            return f"{name}: {found.bytes} bytes with another digest than the manifest's"
    return None
