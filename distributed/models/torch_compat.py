"""torch's private names for layers, as read from torch 2.14.1.

tests/unit/test_torch_internals.py fails if the installed torch lacks one of them, or one of the undocumented kernels that
models, engines and optimizers call.
"""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm as AnyBatchNorm
from torch.nn.modules.batchnorm import _NormBase as NormBase
from torch.nn.modules.dropout import _DropoutNd as AnyDropout

__all__ = ["AnyBatchNorm", "AnyDropout", "NormBase", "is_persistent"]


def is_persistent(module: nn.Module, buffer_name: str) -> bool:
    """Whether a buffer of the module is part of its state_dict."""
    return buffer_name not in module._non_persistent_buffers_set
