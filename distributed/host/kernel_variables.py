"""Names of environment variables that select numerical kernels, and so determine the bits. Imports no torch."""

import re

# Variables that select kernels or the order in which they sum, on CPU or GPU; not those that only log, cache or limit memory.
_PATTERN = re.compile(
    r"ATEN_CPU_CAPABILITY|(ONEDNN|DNNL)_(?!VERBOSE|JIT_(PROFILE|DUMP)|PRIMITIVE_CACHE)\w+|"
    r"MKL_(CBWR\w*|ENABLE_INSTRUCTIONS|DEBUG_CPU_TYPE|DYNAMIC|DOMAIN_NUM_THREADS|NUM_STRIPES|\w+_LAYER)|"
    r"OPENBLAS_(CORETYPE|NUM_THREADS)|BLIS_(ARCH_TYPE|MODEL_TYPE|\w+_NT|NUM_THREADS)|GLIBC_TUNABLES|"
    r"OMP_(THREAD_LIMIT|DYNAMIC|SCHEDULE)|"  # not OMP_NUM_THREADS: launchers set it, and we set the number of threads
    r"KMP_(DETERMINISTIC_REDUCTION|FORCE_REDUCTION|DYNAMIC_MODE|ALL_THREADS|DEVICE_THREAD_LIMIT|TEAMS_THREAD_LIMIT)|"
    r"TORCHINDUCTOR_(?!\w*(CACHE|COMPILE_THREADS|WORKER|DEBUG|TRACE|PROVENANCE))\w+|TORCHDYNAMO_DISABLE|TORCH_COMPILE_DISABLE|"
    r"NVIDIA_TF32_OVERRIDE|CUBLAS(LT)?_\w+|CUDNN_\w+|NCCL_(ALGO|PROTO|NCHANNELS_PER_NET_PEER|M(IN|AX)_NCHANNELS)|"
    r"TORCH_(BLAS|LINALG)_PREFER_\w+|TORCH_CUDNN_\w+|TORCH_ALLOW_TF32_CUBLAS_OVERRIDE|DISABLE_ADDMM_CUDA_LT|"
    r"PYTORCH_TUNABLEOP_(?!VERBOSE)\w+"
)


def selects_kernels(variable: str) -> bool:
    """Whether an environment variable of this name selects numerical kernels."""
    return _PATTERN.fullmatch(variable) is not None
