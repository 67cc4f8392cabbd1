"""What a node of a Ray cluster is asked before it is given a worker.

Apart from `launch.on_ray.cluster`, so that a node that is asked does not import torch first: seconds.
"""

from pathlib import Path
from typing import Any

import ray

from distributed.config import TrainConfig
from distributed.host.versions import versions
from launch.doctor import probe


@ray.remote(num_cpus=0, max_retries=1)
def look_around(name: str, config: str, token: str) -> dict[str, Any]:
    """`about`, on another node.

    Args:
        config: a `TrainConfig` as JSON.
    """
    return about(name, TrainConfig.model_validate_json(config), token, index=0)


def about(name: str, config: TrainConfig, token: str, *, index: int) -> dict[str, Any]:
    """The report of this node, as `launch.doctor.diagnosis` reads it.

    Args:
        token: name of a file in the run folder that the driver wrote there; "" on the driver's own node.
    """
    report: dict[str, Any] = {"node": name, "index": index}
    probe.find(report, "versions", versions)
    probe.find(report, "code", probe.digest_of_code)
    probe.find(report, "folder", lambda: probe.folder(Path(config.run_dir), token, name))
    probe.find(report, "data", lambda: probe.data(config))
    return report
