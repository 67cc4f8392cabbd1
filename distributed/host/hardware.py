"""Processor and math libraries of this host, which select kernels and so determine the bits. Imports no torch."""

import platform
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

_VECTOR_FLAGS = ("avx", "amx", "fma", "f16c", "sse4", "asimd", "sve", "bf16", "i8mm")
_BFLOAT16_FLAGS = {"amx_bf16", "avx512_bf16", "bf16"}  # Intel and AMD, AMD, Arm
_MODEL_FIELDS = ("vendor_id", "cpu family", "model", "CPU implementer", "CPU part")
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
# Libraries for math or threads. Those of the C library are recorded by its version.
_MATH_LIBRARY = re.compile(
    r"lib(mkl_\w+|openblas\w*|blis\w*|c?blas|i?omp5?|gomp|amdlibm|alm|svml|imf|m|dnnl|sleef\w*)[-.].*so.*"
)
_IN_PACKAGE = re.compile(r"/(torch|numpy|scipy|\w+\.libs)/")


def processor() -> str:
    """Return the processor's name, which a virtual machine may have set."""
    return _cpuinfo().get("model name", "") or platform.processor()


def processor_model() -> str:
    """Describe vendor, family, model and cache sizes of the processor: libraries choose block sizes by them."""
    fields = [f"{name} {_cpuinfo()[name]}" for name in _MODEL_FIELDS if name in _cpuinfo()]
    sizes = [size for index in sorted(_CACHES.glob("index*")) if (size := _text(index / "size").strip())]
    return ", ".join([*fields, *([f"caches {' '.join(sizes)}"] if sizes else [])])


def instructions() -> str:
    """Return the processor's vector instruction sets."""
    flags = (_cpuinfo().get("flags") or _cpuinfo().get("Features", "")).split()
    return " ".join(sorted(flag for flag in flags if flag.startswith(_VECTOR_FLAGS)))


def multiplies_bfloat16(flags: str | None = None) -> bool:
    """Return whether a processor has instructions for products in bfloat16; without them torch is far slower than in float32.

    Args:
        flags: its instruction sets; by default those of this host's processor.
    """
    return not _BFLOAT16_FLAGS.isdisjoint((instructions() if flags is None else flags).split())


def c_library() -> str:
    """Return name and version of the C library, which provides log and cos."""
    return " ".join(platform.libc_ver())


def math_libraries() -> str:
    """Return names and sizes of the loaded math and thread libraries that no Python package contains, e.g. from LD_PRELOAD.

    Usually empty.
    """
    files = {
        Path(line.split(maxsplit=5)[5])
        for line in _text(Path("/proc/self/maps")).splitlines()
        if line.count("/") and ".so" in line
    }
    system = {file.parent for file in files if file.name.startswith("libc.so.")}
    found = [
        f"{file.name} ({_size(file)} bytes)"
        for file in files
        if _MATH_LIBRARY.fullmatch(file.name) and not _IN_PACKAGE.search(str(file))
        if not (file.parent in system and file.name.startswith("libm.so."))
    ]
    return ", ".join(sorted(found))


@cache
def _cpuinfo() -> dict[str, str]:
    return dict(reversed(list(_fields(_text(Path("/proc/cpuinfo"))))))


def _fields(text: str) -> Iterator[tuple[str, str]]:
    for line in text.splitlines():
        name, colon, value = line.partition(":")
        if colon:
            yield name.strip(), value.strip()


def _text(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0
