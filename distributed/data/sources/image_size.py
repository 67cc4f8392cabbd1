"""Reads the size of a PNG or JPEG, and checks a PNG's checksums, before it is decoded. Imports no torch."""

import re
import zlib

PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # JPEG's markers of a frame, which begins with its size
_ALONE = {0x00, 0x01, *range(0xD0, 0xD9)}  # no length follows
_SCAN, _END = 0xDA, 0xD9
_NAME = re.compile(rb"[^\xff]")


def size_of(content: bytes) -> tuple[int, int]:
    """(width, height) as the file says.

    Raises:
        ValueError: it is neither PNG nor JPEG, or its header is broken.
    """
    size = None
    if content.startswith(PNG) and content[12:16] == b"IHDR" and len(content) >= 24:
        size = int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")
    elif content.startswith(JPEG):
        size = _size_of_jpeg(content)
    elif not content.startswith(PNG):
        raise ValueError("neither PNG nor JPEG, whatever its name says" if content else "empty")
    if size is None:
        raise ValueError("broken: no size in its header")
    return size


def _size_of_jpeg(content: bytes) -> tuple[int, int] | None:
    """The first frame's size; segments before it, e.g. a thumbnail, are passed over by their lengths."""
    at = 2
    # A marker is any number of 0xFF, then another byte.
    while (at := content.find(b"\xff", at)) >= 0 and (found := _NAME.search(content, at)):
        marker, at = found[0][0], found.end()
        if marker in (_SCAN, _END):
            return None
        if marker in _FRAMES:
            frame = content[at : at + 7]
            return (int.from_bytes(frame[5:7], "big"), int.from_bytes(frame[3:5], "big")) if len(frame) == 7 else None
        if marker not in _ALONE:
            at += int.from_bytes(content[at : at + 2], "big")
    return None


def check_sums(content: bytes) -> None:
    """Raises ValueError if a PNG is truncated, or a critical chunk fails its CRC. JPEG has no checksums."""
    at = len(PNG)
    while content.startswith(PNG):
        length, name = int.from_bytes(content[at : at + 4], "big"), content[at + 4 : at + 8]
        end = at + 8 + length
        if end + 4 > len(content):
            raise ValueError("broken: cut off")
        if name[:1].isupper() and zlib.crc32(memoryview(content)[at + 4 : end]) != int.from_bytes(
            content[end : end + 4], "big"
        ):
            raise ValueError(f"broken: wrong checksum of {name.decode('ascii', 'replace')}")
        if name == b"IEND":
            return
        at = end + 4


class TooLarge(ValueError):
    """An image of more than `data.max_pixels`; the message has the remedy."""


def too_large(size: str, max_pixels: int) -> str:
    """What is said of an image beyond `data.max_pixels`."""
    return f"{size}, more than data.max_pixels = {max_pixels:,} allows; scale or crop it, or raise --data.max_pixels"
