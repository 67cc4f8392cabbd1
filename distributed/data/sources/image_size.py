"""Reads the size of a PNG or JPEG, and verifies a PNG's checksums, before it is decoded. Imports no torch."""

import re
import zlib

PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # JPEG's frame markers; a frame begins with its size
_WITHOUT_LENGTH = {0x00, 0x01, *range(0xD0, 0xD9)}
_SCAN, _END = 0xDA, 0xD9
_NAME = re.compile(rb"[^\xff]")


def size_of(content: bytes) -> tuple[int, int]:
    """Return (width, height) from the file's header.

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
    """Return the size of the first frame; segments before it, e.g. a thumbnail, are skipped by their lengths."""
    at = 2
    # A marker is one or more bytes 0xFF, then another byte.
    while (at := content.find(b"\xff", at)) >= 0 and (found := _NAME.search(content, at)):
        marker, at = found[0][0], found.end()
        if marker in (_SCAN, _END):
            return None
        if marker in _FRAMES:
            frame = content[at : at + 7]
            return (int.from_bytes(frame[5:7], "big"), int.from_bytes(frame[3:5], "big")) if len(frame) == 7 else None
        if marker not in _WITHOUT_LENGTH:
            at += int.from_bytes(content[at : at + 2], "big")
    return None


def check_sums(content: bytes) -> None:
    """Raise ValueError if a PNG is truncated or a critical chunk fails its CRC. JPEG has no checksums."""
    at = len(PNG)
    while content.startswith(PNG):
        length, name = int.from_bytes(content[at : at + 4], "big"), content[at + 4 : at + 8]
        end = at + 8 + length
        if end + 4 > len(content):
            raise ValueError("broken: truncated")
        checksum = int.from_bytes(content[end : end + 4], "big")
        if name[:1].isupper() and zlib.crc32(memoryview(content)[at + 4 : end]) != checksum:
            raise ValueError(f"broken: wrong checksum of {name.decode('ascii', 'replace')}")
        if name == b"IEND":
            return
        at = end + 4


class TooLarge(ValueError):
    """An image has more than `data.max_pixels`; the message names the remedy."""


def too_large(size: str, max_pixels: int) -> str:
    """Return the message about an image with more than `data.max_pixels`."""
    return f"{size}, more than data.max_pixels = {max_pixels:,} allows; scale or crop it, or raise --data.max_pixels"
