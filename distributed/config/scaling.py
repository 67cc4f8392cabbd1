"""Settings of the workers on a Ray cluster. Imports no torch."""

from typing import Literal

from distributed.config.schema import OptionalPath, Section, operational


class Scaling(Section):
    """What `launch.ray_train` requests from a Ray cluster; the other launchers have options of their own."""

    num_workers: int = operational(2, "number of Ray workers, one process each", ge=1, le=65536)
    min_workers: int | None = operational(
        None, "fewest workers to continue with if the cluster has no more; grows back later; none: always num_workers",
        ge=1,
    )  # fmt: skip
    cpus_per_worker: int = operational(
        1, "CPU cores reserved per worker, and its number of threads unless `threads` is set", ge=1, le=4096
    )
    gpus_per_worker: int = operational(0, "GPUs reserved per worker", ge=0, le=1)
    placement: Literal["pack", "spread", "strict_pack", "strict_spread"] = operational(
        "pack", "pack: workers on few nodes; spread: on many; strict_pack: on one node; strict_spread: one per node"
    )
    max_failures: int = operational(
        3, "consecutive failures to survive, without a checkpoint in between; drained nodes do not count", ge=0
    )
    wait_seconds: float = operational(60.0, "wait this long for capacity on the cluster before giving up", ge=0, le=1e7)
    resize_seconds: float = operational(
        30.0, "seconds between checks for capacity while there are fewer than num_workers", gt=0, le=1e7
    )
    storage_path: OptionalPath = operational(None, "folder shared by all nodes, in which a relative run_dir is created")

    @property
    def least_workers(self) -> int:
        """The fewest workers that the run may continue with."""
        return self.min_workers or self.num_workers

    def conflicts(self, device: str) -> list[str]:
        """Return one line per conflict within the section or with `device`."""
        found = []
        if self.least_workers > self.num_workers:
            found.append(
                f"scaling.min_workers = {self.min_workers} is more than scaling.num_workers = {self.num_workers}: lower it"
            )
        if self.min_workers and self.placement.startswith("strict"):
            found.append(
                f"scaling.placement = {self.placement} cannot be combined with scaling.min_workers, under which a run grows "
                f"wherever it fits: set {self.placement.removeprefix('strict_')}, or remove min_workers"
            )
        default = type(self).model_fields["resize_seconds"].default
        if self.least_workers == self.num_workers and self.resize_seconds != default:
            found.append(
                f"scaling.resize_seconds = {self.resize_seconds:g} has no effect: the number of workers is fixed; set "
                "scaling.min_workers too, or remove it"
            )
        if device == "cuda" and not self.gpus_per_worker:
            found.append("device = cuda needs scaling.gpus_per_worker = 1: with 0 Ray reserves no GPU for a worker")
        if device == "cpu" and self.gpus_per_worker:
            found.append(
                "device = cpu with scaling.gpus_per_worker = 1 reserves GPUs that it does not use: set it to 0"
            )
        return found
