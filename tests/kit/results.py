"""Records of runs, as results/results.json has them."""

from typing import Any

from distributed.experiments.catalogue import CATALOGUE
from distributed.experiments.plan import planned_config
from distributed.experiments.result import CurvePoint, Result

CPU = {"kind": "cpu", "device": "a CPU", "cores": 2}
GPU = {"kind": "gpu", "device": "a GPU", "cores": 16}


def result_of(id: str = "I-10", **values: Any) -> Result:
    """Return the record of a complete run on a CPU, as the catalogue plans it, with these values."""
    experiment = CATALOGUE[id]
    epochs = values.get("epochs", planned_config(experiment).epochs)
    fields = {
        "id": id, "kind": experiment.kind, "config": experiment.config, "settings": tuple(sorted(experiment.settings)),
        "seed": 0, "model": "improved_alexnet", "data": "cifar10", "validation": None, "test": 83.7, "test_loss": 0.48,
        "train": 84.4, "minutes": 4.2, "epochs": epochs, "of_epochs": epochs, "ended_early": False, "at_epoch": epochs,
        "attempts": 1, "processes": "2", "machine": CPU, "precision": "bfloat16", "exact_shards": 8,
        "versions": {"torch": "2.11.0"}, "date": "2026-11-22", "revision": "0123456789ab", "command": "python", "curve": None,
    }  # fmt: skip
    return Result(**fields | values)


def curve_of(*tests: float, minutes: float = 1.0) -> tuple[CurvePoint, ...]:
    """Return a curve of these test accuracies, one per epoch; each epoch takes `minutes`."""
    return tuple(
        CurvePoint(epoch=epoch, minutes=minutes * epoch, train=50.0, validation=None, test=test)
        for epoch, test in enumerate(tests, start=1)
    )
