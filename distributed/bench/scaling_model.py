"""A model of a training step that takes the number of processes and of cores, fitted to measured steps.

    step = r * (fixed + per_image * images + exchange + per_peer * (processes - 1)) + synchronizing + sharing * (r - 1)

where r = ceil(processes / cores) processes take turns on a core, `images` are those of the busiest process, and the terms of
exchange and synchronizing apply to two processes and more. The bracket is CPU time and fitted to measured CPU time, so other
programs on the machine disturb it little. The last two terms are fitted to what the measured steps take beyond it.
Not in the model: cores that slow each other down, and several hosts.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

BATCH, SHARDS = 128, 8


class Point(NamedTuple):
    """A measured step in ms: its wall time, and the CPU time that a process spends on computing and on exchanging data."""

    processes: int
    cores: int
    wall: float
    compute: float
    exchange: float


class StepModel(NamedTuple):
    """The coefficients of a step in ms, for one mode of training."""

    exact: bool
    fixed: float
    per_image: float
    exchange: float
    per_peer: float
    synchronizing: float
    sharing: float

    def step(self, processes: int, cores: int) -> float:
        """Return the predicted wall time of a step in ms."""
        several, turns = processes > 1, math.ceil(processes / cores)
        compute = self.fixed + self.per_image * busiest_images(processes, exact=self.exact)
        exchange = several * (self.exchange + self.per_peer * (processes - 1))
        return turns * (compute + exchange) + several * self.synchronizing + self.sharing * (turns - 1)


def busiest_images(processes: int, *, exact: bool) -> int:
    """Return the images of the process with the most. In exact mode a process has entire shards."""
    return BATCH // SHARDS * math.ceil(SHARDS / processes) if exact else math.ceil(BATCH / processes)


def fit(points: Sequence[Point], *, exact: bool) -> StepModel:
    """Fit the model by least squares, with no negative coefficient."""
    images = [float(busiest_images(point.processes, exact=exact)) for point in points]
    fixed, per_image = _least_squares([[1.0] * len(points), images], [point.compute for point in points])
    several = [point for point in points if point.processes > 1]
    ones, peers = [1.0] * len(several), [point.processes - 1.0 for point in several]
    exchange, per_peer = _least_squares([ones, peers], [point.exchange for point in several])
    cpu = StepModel(exact, fixed, per_image, exchange, per_peer, 0.0, 0.0)
    beyond = [point.wall - cpu.step(point.processes, point.cores) for point in several]
    turns = [math.ceil(point.processes / point.cores) - 1.0 for point in several]
    synchronizing, sharing = _least_squares([ones, turns], beyond)
    return cpu._replace(synchronizing=synchronizing, sharing=sharing)


def residuals(model: StepModel, points: Sequence[Point]) -> Mapping[int, float]:
    """Return the relative difference of each measured step from the model's, by the number of processes."""
    return {point.processes: point.wall / model.step(point.processes, point.cores) - 1 for point in points}


def _least_squares(columns: Sequence[Sequence[float]], values: Sequence[float]) -> list[float]:
    """Return the coefficients of the columns. Those that would be negative, and those of columns of zeros, are 0."""
    used = [index for index, column in enumerate(columns) if any(column)]
    found = [0.0] * len(columns)
    while used and values:
        matrix = np.array([columns[index] for index in used]).T
        solution = np.linalg.lstsq(matrix, np.array(values), rcond=None)[0]
        if solution.min() >= 0:
            for index, coefficient in zip(used, solution.tolist(), strict=True):
                found[index] = coefficient
            break
        del used[int(solution.argmin())]
    return found
