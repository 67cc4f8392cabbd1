"""The installed DeepSpeed still has the undocumented names that `engine/deepspeed_compat.py` uses."""

from importlib.util import find_spec
from pathlib import Path

import pytest

FOUND = find_spec("deepspeed")
NAMES = {
    "ops/__init__.py": ["__compatible_ops__"],
    "ops/op_builder/cpu/comm.py": ['NAME = "deepspeed_shm_comm"'],
    "runtime/engine.py": ["self.basic_optimizer = basic_optimizer", "def empty_partition_cache("],
    "runtime/zero/stage_1_and_2.py": [
        "def refresh_fp32_params(",
        "self.bit16_groups = []",
        "self.single_partition_of_fp32_groups = []",
    ],
    "runtime/zero/stage3.py": [
        "def refresh_fp32_params(",
        "def get_param_id(",
        "self.grad_position[param_id] = [int(i), int(current_offset), int(num_elements)]",
        "self.fp32_partitioned_groups_flat = []",
    ],
    "runtime/zero/partition_parameters.py": ["param.ds_tensor"],
    "utils/tensor_fragment.py": [
        "lp_fragment_address: fragment_address",
        "hp_fragment_address: fragment_address",
        "_hp_mapping",
    ],
}


@pytest.mark.skipif(FOUND is None, reason="deepspeed is not installed")
@pytest.mark.parametrize(("file", "name"), [(file, name) for file, names in NAMES.items() for name in names])
def test_deepspeed_has_the_internals_that_we_use(file: str, name: str) -> None:
    assert FOUND is not None
    assert FOUND.origin is not None
    # Read, not imported: importing deepspeed takes seconds and looks for accelerators.
    assert name in (Path(FOUND.origin).parent / file).read_text()
