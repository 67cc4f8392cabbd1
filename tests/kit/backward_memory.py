"""Peak memory of a backward pass: `python -m kit.backward_memory NETWORK engine|pass` prints the forward and backward peaks.

One process per measurement, because a peak never falls. `compared` starts both and compares what they add to the memory before.
"""

import json
import subprocess
import sys
from typing import NamedTuple

from kit.commands import ROOT
from kit.memory import peak_mib


class Memory(NamedTuple):
    """Peaks of resident memory in MiB."""

    before: float
    forward: float
    backward: float


LARGER = {
    "convnext_tiny": {"blocks": [2, 2, 4, 2], "width": 48},
    "vit_b_16": {"image_size": 96, "layers": 6, "width": 96},
    "lstm": {"side": 96, "width": 768},
}
"""Options of the shrunk networks under which a pass needs far more memory than torch itself varies by."""
IMAGES, SIDE = 32, 96


def measured(network: str, how: str) -> Memory:
    """Measure one step of `network` on one shard in this process, with torch's engine or with the pass in Python."""
    import torch
    from torch.nn import functional as F

    from distributed.config.models import ImportedModel
    from distributed.exact.autograd_pass import backward
    from distributed.models.build import build_model
    from distributed.models.keyed_dropout import use_sample_keys
    from distributed.rng import sample_keys
    from kit.networks import NETWORKS

    torch.set_num_threads(1)
    config = ImportedModel(name=NETWORKS[network], options=LARGER.get(network, {}))
    model = build_model(config, num_classes=10, seed=0)
    images, labels = torch.randn(IMAGES, 3, SIDE, SIDE), torch.arange(IMAGES) % 10
    keys = sample_keys(torch.arange(IMAGES), seed=0, epoch=0)
    before = peak_mib()
    with use_sample_keys(keys):
        losses = [F.cross_entropy(model(images), labels)]  # a list: no other reference may keep the graph
    forward = peak_mib()
    if how == "engine":
        losses.pop().backward()
    else:
        gradients = {}
        backward(losses.pop(), gradients.__setitem__, {})
        assert len(gradients) == len(list(model.parameters()))
    return Memory(before, forward, peak_mib())


def compared(network: str) -> dict[str, Memory]:
    """Return the peaks with torch's engine and with the pass in Python, each measured in a process of its own."""
    found = {}
    for how in ("engine", "pass"):
        command = [sys.executable, "-m", "kit.backward_memory", network, how]
        environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
        found[how] = Memory(*json.loads(done.stdout))
    return found


if __name__ == "__main__":
    print(json.dumps(measured(*sys.argv[1:])))
