"""The low precision in which long tests compute."""

from distributed.host.hardware import multiplies_bfloat16

LOW = "bfloat16" if multiplies_bfloat16() else "float32"
"""bfloat16, unless the processor has no instructions for it: there these tests would take 10 times as long."""
