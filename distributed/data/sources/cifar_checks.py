"""Finds content that no copy of CIFAR can have, in any order of records, from hashes and labels. Imports no torch.

Data that differs in some pixels is accepted: a flipped bit cannot be distinguished from a deliberate change. Its digest
differs from the official one, which causes a warning.
"""

from collections.abc import Iterator, Mapping
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distributed.data.sources.cifar_spec import COARSE_OF_FINE, CifarSet
from distributed.data.sources.identity import Hashes, image_hashes

Labels = NDArray[np.integer[Any]]
_BLACK = image_hashes(np.zeros((1, 3072), np.uint8))[0]
_MAX_REPEATED = 0.01
"""Fraction of the images that may occur twice: CIFAR-100 has 26 such pairs in 60,000, CIFAR-10 none."""


class FileContent(NamedTuple):
    """The hashes of a file's images [n] and their labels [n]."""

    hashes: Hashes
    labels: Labels


def wrong_file(files: Mapping[str, FileContent]) -> tuple[str, str] | None:
    """Return (file, complaint) for the first file with black or repeated images; None if there is none."""
    for name, (hashes, _) in files.items():
        if black := np.count_nonzero(hashes == _BLACK):
            return name, f"{black:,} of its {len(hashes):,} images are black: a copy or download is incomplete"
    hashes = np.concatenate([content.hashes for content in files.values()])
    if len(hashes) - len(np.unique(hashes)) <= _MAX_REPEATED * len(hashes):
        return None
    count, name, where = max(_repetitions(files), key=itemgetter(0))
    return name, f"{count:,} of its {len(files[name].hashes):,} images are in {where}"


def _repetitions(files: Mapping[str, FileContent]) -> Iterator[tuple[int, str, str]]:
    """Yield (number of repeated images, file, where else they are) for each file and each pair of files."""
    for name, (hashes, _) in files.items():
        yield len(hashes) - len(np.unique(hashes)), name, "it more than once"
    names = list(files)
    for index, name in enumerate(names):
        for before in names[:index]:
            yield int(np.isin(files[name].hashes, files[before].hashes).sum()), name, f"{before} too"


def wrong_counts(cifar: CifarSet, split: str, labels: Labels) -> str | None:
    """Return a complaint if a split has the official size, but not the official number of images per class."""
    expected = cifar.per_class[split]
    if len(labels) != expected * cifar.classes:
        return None
    counts = np.bincount(labels, minlength=cifar.classes)
    wrong = [f"{counts[label]:,} of {cifar.class_names[label]}" for label in np.flatnonzero(counts != expected)]
    if not wrong:
        return None
    more = f" and {len(wrong) - 3} more classes" if wrong[3:] else ""
    return f"its {split} files hold {', '.join(wrong[:3])}{more}; expected {expected:,} of each class"


def wrong_coarse(coarse: Labels, fine: Labels) -> str | None:
    """Return a complaint if records of CIFAR-100 have a coarse label that does not belong to their fine label.

    Fine labels that are out of range are left to other checks.
    """
    in_range = fine < len(COARSE_OF_FINE)
    expected = np.array(COARSE_OF_FINE)[np.where(in_range, fine, 0)]
    wrong = np.flatnonzero(in_range & (coarse != expected))
    if not len(wrong):
        return None
    first = wrong[0]
    return (
        f"{len(wrong):,} of its {len(fine):,} records have the coarse label of another class (record {first}: fine label "
        f"{fine[first]}, coarse label {coarse[first]}, expected {expected[first]}): label bytes are swapped or damaged"
    )
