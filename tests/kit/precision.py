"""The precision in which large networks are tested."""

from distributed.host.hardware import multiplies_bfloat16

LOW = "bfloat16" if multiplies_bfloat16() else "float32"
"""bfloat16, unless the processor has no instructions for it: there a step of a large network takes a minute."""
