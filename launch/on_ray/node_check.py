"""Checks a node of a Ray cluster before it gets a worker.

Separate from `launch.on_ray.cluster`, so that a node under test does not first import torch for seconds.
"""

from pathlib import Path

import ray

from distributed.config import TrainConfig
from distributed.host.versions import versions
from launch.doctor import probe
from launch.doctor.reports import NodeReport


@ray.remote(num_cpus=0, max_retries=1)
def remote_report(name: str, config: str, token: str) -> NodeReport:
    """Run `node_report` on another node.

    Args:
        config: a `TrainConfig` as JSON.
    """
    return node_report(name, TrainConfig.model_validate_json(config), token, index=0)


def node_report(name: str, config: TrainConfig, token: str, *, index: int) -> NodeReport:
    """Return the report of this node, without devices and network.

    Args:
        token: name of the file that the driver wrote into the run folder; empty on the driver's own node.
        index: the node with the lowest index is the reference for versions.
    """
    return probe.examine(
        name,
        index,
        {
            "versions": versions,
            "code": probe.code_digest,
            "folder": lambda: probe.examine_folder(Path(config.run_dir), token, name),
            "model": lambda: probe.model_digest(config),
            "data": lambda: probe.check_data(config),
        },
    )
