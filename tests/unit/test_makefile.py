"""What `make train` starts: one process per visible GPU, two without a GPU."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from kit.commands import ROOT

THREE = "echo 'GPU 0: A'; echo '  MIG 1g.10gb Device 0'; echo 'GPU 1: A'; echo 'GPU 2: A'"


@pytest.mark.skipif(not shutil.which("make"), reason="make not installed")
@pytest.mark.parametrize(
    ("visible", "installed", "ranks"),
    [
        (None, THREE, 3), (None, "exit 127", 2), ("", THREE, 2), ("0,1,2,3", THREE, 4), ("0,1", "exit 127", 2),
        ("2", THREE, 1), ("-1", THREE, 2),
    ],
)  # fmt: skip
def test_make_train_starts_a_process_per_visible_gpu(
    visible: str | None, installed: str, ranks: int, tmp_path: Path
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{installed}\n")
    program.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    if visible is not None:
        environment["CUDA_VISIBLE_DEVICES"] = visible
    printed = subprocess.run(
        ["make", "-n", "train"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert re.findall(r"torchrun --nproc_per_node=(\d+)", printed.stdout) == [str(ranks)]
