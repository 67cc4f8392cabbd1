"""The processor that this process runs on, as far as libraries choose their kernels by it. Imports no torch."""

import platform

_VECTOR_FLAGS = ("avx", "amx", "fma", "f16c", "sse4", "asimd", "sve", "bf16", "i8mm")


def processor() -> str:
    """The name of the processor: libraries choose their kernels, and so the bits, by it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line.split(":")[1].strip() for line in file if line.startswith("model name")), "")
    except OSError:
        return platform.processor()


def instructions() -> str:
    """The processor's vector instructions, by which libraries choose kernels; its name may be a virtual machine's."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            flags = next((line.split(":")[1].split() for line in file if line.startswith(("flags", "Features"))), [])
    except OSError:
        return ""
    return " ".join(sorted(flag for flag in flags if flag.startswith(_VECTOR_FLAGS)))
