"""`python -m launch.ray_train [CONFIG.toml] [--SETTING VALUE ...]`: the same recipe on the workers of a Ray cluster.

The section `scaling` says how many workers of what. What is wrong with the input ends here, before ray or torch is imported
or anything is scheduled. Ctrl-C, SIGTERM and `ray job stop` save at the next step; the same command goes on from there.
"""

import sys

from distributed.config import help_text
from distributed.errors import ExitCode, InputError
from distributed.host.shipped import shipped
from distributed.host.versions import require
from distributed.process.streams import run_command
from distributed.topology import Topology
from distributed.train import refuse
from launch.environment import ray_address
from launch.on_ray.environment import set_environment
from launch.on_ray.settings import check_address, checked, swept, without_sweep

_USAGE = """\
usage: python -m launch.ray_train [CONFIG] [--SETTING VALUE ...]
       ray job submit --runtime-env {job} --working-dir . -- python -m launch.ray_train ...

Trains on a Ray cluster: the one that RAY_ADDRESS names, else the one that runs on this machine, else one of its own. How
many workers, of what: the settings scaling.*. Paths are absolute; run_dir is on storage that all nodes share.
--sweep.SETTING A,B trains once for each value, as many at once as there is room for, and tells which is the best by
validation. The other settings are those of python -m distributed.train:

"""


def main() -> int:
    """The exit code; `ExitCode` says what each means."""
    words = sys.argv[1:]
    if {"-h", "--help"} & set(words):
        print(_USAGE.format(job=shipped("launch/ray_job.yaml")) + help_text())
        return ExitCode.FINISHED
    try:
        require("ray", at_least=(2, 60), needed_by="launch.ray_train")
        words, sweep = without_sweep(words)
        trainings = swept(words, sweep) if sweep else [checked(words)]
        check_address(ray_address())
    except InputError as error:
        return refuse(error, Topology())
    set_environment()
    if sweep:
        from launch.on_ray import sweep as ray_sweep  # ray comes in here, after all that could be wrong was checked

        return ray_sweep.run(trainings)
    [training] = trainings
    if training.finished:
        print(f"{training.config.run_dir}: this run is finished; nothing is left to do", file=sys.stderr)
        return ExitCode.FINISHED
    from launch.on_ray import driver

    return driver.run(training)


if __name__ == "__main__":
    # Under its own name, so that what goes to the workers is found there by name.
    from launch.ray_train import main as run

    run_command(run)
