"""Packs CIFAR-10 into parts small enough to upload, lossless WebP mosaics of 2,500 images, and unpacks the official files.

A part is a folder of mosaics named FILE.START.webp, e.g. data_batch_1.bin.02500.webp, each with the pixels of 2,500 records of
that file. The first part also has each file's labels (FILE.labels), and index.json with each file's number of records and
BLAKE2b digest.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distributed.data.sources import cifar
from distributed.data.sources.cifar_spec import CIFAR10
from distributed.errors import InputError
from distributed.files import digest_of, digest_of_bytes, read_object
from distributed.host.cpu_quota import available_cpus

Bytes = NDArray[np.uint8]
COLUMNS = 50
IMAGES = COLUMNS * COLUMNS  # in a full mosaic
_PIXELS = 3 * 32 * 32
# The fastest lossless setting: 0.2 s and 4.26 MiB per mosaic. The slowest takes 49 s and is 6 % smaller.
_WEBP: dict[str, Any] = {"format": "WEBP", "lossless": True, "method": 0, "quality": 0}


def pack(root: Path, parts: Sequence[Path]) -> None:
    """Pack the CIFAR-10 in `root` into part folders, which are recreated. Keeps the order of images.

    Raises:
        InputError: CIFAR-10 is missing or damaged.
    """
    train, test = cifar.read_splits("cifar10", root)
    form = CIFAR10.forms[0]
    batches = np.split(records_of(*train), len(form.train))
    pack_files(dict(zip((*form.train, form.test), (*batches, records_of(*test)), strict=True)), parts)


def pack_files(records: Mapping[str, Bytes], parts: Sequence[Path]) -> None:
    """Pack official files, given by name as records uint8 [n, 1 + 3072]: a label, then channel-major pixels."""
    for part in parts:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    index = {}
    for name, rows in records.items():
        index[name] = {"records": len(rows), "digest": digest_of_bytes(rows.tobytes()).digest}
        rows[:, 0].tofile(parts[0] / f"{name}.labels")
    (parts[0] / "index.json").write_text(json.dumps(index, indent=1) + "\n")
    mosaics = [(name, start) for name, rows in records.items() for start in range(0, len(rows), IMAGES)]
    with _pool(len(mosaics)) as pool:
        work = []
        for part, own in zip(parts, np.array_split(np.arange(len(mosaics)), len(parts)), strict=True):
            for name, start in (mosaics[i] for i in own):
                pixels = records[name][start : start + IMAGES, 1:]
                work.append(pool.submit(_write_mosaic, pixels, part / _mosaic_name(name, start)))
        for task in work:
            task.result()


def unpack(parts: Sequence[Path], to: Path) -> Path:
    """Rebuild the official binary files in their folder within `to`, all of them or none, and return that folder.

    Raises:
        InputError: a part is missing or damaged.
    """
    index: dict[str, Any] = next((found for part in parts if (found := read_object(part / "index.json"))), {})
    folder = to / CIFAR10.forms[0].folder
    temporary = to / f".{folder.name}.{os.getpid()}"
    temporary.mkdir(parents=True)
    try:
        if not index:
            raise InputError(f"{', '.join(map(str, parts))}: no index.json; add the part that the first call carried")
        _write_files(index, parts, temporary)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    except (KeyError, TypeError, ValueError, OSError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{', '.join(map(str, parts))}: damaged: {error}; pack them again") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _write_files(index: dict[str, Any], parts: Sequence[Path], folder: Path) -> None:
    found = {path.name: path for part in parts for path in part.iterdir()}
    wanted = [(name, start) for name, entry in index.items() for start in range(0, entry["records"], IMAGES)]
    files = [*(_mosaic_name(name, start) for name, start in wanted), *(f"{name}.labels" for name in index)]
    if missing := [file for file in files if file not in found]:
        raise InputError(f"{len(missing)} files are missing, the first {missing[0]}; name all parts")
    with _pool(len(wanted)) as pool:
        work = []
        for name, entry in index.items():
            labels = np.fromfile(found[f"{name}.labels"], np.uint8)
            (folder / name).write_bytes(b"")
            os.truncate(folder / name, entry["records"] * (1 + _PIXELS))
            for start in range(0, entry["records"], IMAGES):
                own = labels[start : start + IMAGES]
                work.append(pool.submit(_write_records, found[_mosaic_name(name, start)], own, folder / name, start))
        for task in work:
            task.result()
        digests = pool.map(digest_of, [folder / name for name in index])
        damaged = [
            name for (name, entry), file in zip(index.items(), digests, strict=True) if file.digest != entry["digest"]
        ]
    if damaged:
        raise InputError(f"{', '.join(damaged)}: unpacked bytes differ from the packed ones; pack the parts again")


def records_of(images: Bytes, labels: NDArray[Any]) -> Bytes:
    """Return official records uint8 [n, 1 + 3072] of images uint8 [n, 32, 32, 3]."""
    planes = images.transpose(0, 3, 1, 2).reshape(len(images), _PIXELS)
    return np.hstack([labels.astype(np.uint8)[:, None], planes])


def mosaic_of(pixels: Bytes) -> Bytes:
    """Arrange channel-major pixels uint8 [n, 3072] as one picture [32 * rows, 32 * 50, 3], padded with black images."""
    rows = -(-len(pixels) // COLUMNS)
    padded = np.zeros((rows * COLUMNS, _PIXELS), np.uint8)
    padded[: len(pixels)] = pixels
    return padded.reshape(rows, COLUMNS, 3, 32, 32).transpose(0, 3, 1, 4, 2).reshape(rows * 32, COLUMNS * 32, 3)


def pixels_of(mosaic: Bytes, count: int) -> Bytes:
    """Return the first `count` images of a mosaic as uint8 [count, 3072]; inverse of `mosaic_of`."""
    rows = len(mosaic) // 32
    return mosaic.reshape(rows, 32, COLUMNS, 32, 3).transpose(0, 2, 4, 1, 3).reshape(-1, _PIXELS)[:count]


def _mosaic_name(file: str, start: int) -> str:
    return f"{file}.{start:05d}.webp"


def _write_mosaic(pixels: Bytes, path: Path) -> None:
    from PIL import Image

    Image.fromarray(mosaic_of(pixels)).save(path, **_WEBP)


def _write_records(mosaic: Path, labels: Bytes, file: Path, start: int) -> None:
    """Decode one mosaic, and write its records at their offset in a file of full length."""
    from PIL import Image

    with Image.open(mosaic) as picture:
        pixels = pixels_of(np.asarray(picture.convert("RGB")), len(labels))
    records = np.hstack([labels[:, None], pixels])
    with file.open("r+b") as out:
        out.seek(start * records.shape[1])
        out.write(records.tobytes())


def _pool(tasks: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(max(1, min(tasks, available_cpus())))
