"""`python -m launch.ray_train [CONFIG.toml] [--SETTING VALUE ...]`: runs the same recipe on the workers of a Ray cluster.

The section `scaling` sets number and kind of workers. Input errors are reported here, before ray or torch is imported or
anything is scheduled. On Ctrl-C, SIGTERM and `ray job stop` the run saves at the next step; the same command resumes it.
"""

import sys

from distributed.checkpoint.upload import upload_remaining
from distributed.config import help_text
from distributed.errors import ExitCode, InputError, reachable_paths
from distributed.host.shipped import shipped
from distributed.host.versions import require
from distributed.process.streams import run_command
from distributed.topology import Topology
from distributed.train import refuse
from launch.environment import ray_address
from launch.on_ray.environment import set_environment
from launch.on_ray.settings import check_address, check_training, sweep_trainings
from launch.sweep_arguments import read_sweep, split_sweep

_USAGE = """\
usage: python -m launch.ray_train [CONFIG] [--SETTING VALUE ...]
       ray job submit --runtime-env {job} --working-dir . -- python -m launch.ray_train ...

Trains on a Ray cluster: the one that RAY_ADDRESS names, else the one that runs on this machine, else a new one on this
machine. The settings scaling.* choose the workers. Paths are absolute; run_dir is on storage that all nodes share.

Sweeps run as many trials at once as fit and report the best; in a config, the same names under [sweep]:

  --sweep.SETTING A,B    every combination of the listed values, e.g. --sweep.optim.lr 0.1,0.05
  --sweep.SETTING "log_uniform(1e-4, 1e-1)" --trials N    N random values; also uniform, integers, choice
  --seeds N              each of them with seeds 0 to N - 1
  --sweep.trial_seed N, --sweep.metric validation.loss

The other settings are those of python -m distributed.train:

"""


def main() -> int:
    """Return the exit code, see `ExitCode`."""
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        print(_USAGE.format(job=shipped("launch/ray_job.yaml")) + help_text())
        return ExitCode.FINISHED
    try:
        require("ray", at_least=(2, 60), needed_by="launch.ray_train")
        with reachable_paths():
            split = split_sweep(arguments)
            sweep = read_sweep(split)
            trainings = sweep_trainings(split.common, sweep) if sweep else [check_training(split.common)]
        check_address(ray_address())
    except InputError as error:
        return refuse(error, Topology())
    set_environment()
    for training in trainings:
        if training.finished:
            upload_remaining(training.config)
    if sweep:
        from launch.on_ray import sweep as ray_sweep  # imports ray, now that the input is checked

        return ray_sweep.run(trainings, sweep.metric)
    [training] = trainings
    if training.finished:
        print(f"{training.config.run_dir}: this run is finished; nothing is left to do", file=sys.stderr)
        return ExitCode.FINISHED
    from launch.on_ray import driver

    return driver.run(training)


if __name__ == "__main__":
    # Imported under its own name instead of `__main__`, so that workers can import by name what they are sent.
    from launch.ray_train import main as run

    run_command(run)
