"""The pictures of docs/results.md: accuracies over minutes, per data set and kind of device."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from distributed.experiments.catalogue import ABLATIONS, RECIPES, REFERENCES
from distributed.experiments.result import Result
from distributed.experiments.selection import DEVICES, as_planned
from distributed.experiments.summary import DATA_NAMES
from distributed.figures.accuracy import AccuracyCurve, accuracy_over_minutes

FOLDER = "results"


@dataclass(frozen=True)
class Picture:
    """A picture to draw."""

    name: str
    title: str
    curves: tuple[AccuracyCurve, ...]

    @property
    def description(self) -> str:
        """The digest of what is drawn, which the file holds too: a file with another one is out of date."""
        drawn = json.dumps(asdict(self), sort_keys=True)
        return f"curves {hashlib.blake2b(drawn.encode(), digest_size=16).hexdigest()}"

    def png(self) -> bytes:
        return accuracy_over_minutes(self.curves, title=self.title, description=self.description)


def pictures(results: Sequence[Result]) -> list[Picture]:
    """Return a picture per data set and kind of device on which a run recorded its curve."""
    found = []
    for device in DEVICES:
        bases = [ablation for ablation in ABLATIONS if ablation.is_base]
        planned = [run for each in (*REFERENCES, *RECIPES, *bases) for run in as_planned(results, each, device)[:1]]
        for data, data_name in DATA_NAMES.items():
            curves = tuple(curve for run in planned if run.data == data for curve in _curves(run))
            if curves:
                title = f"{data_name} on a {device.upper()}: accuracy over time"
                found.append(Picture(f"curves_{data}_{device}.png", title, curves))
    return found


def _curves(run: Result) -> Iterator[AccuracyCurve]:
    """Yield the curves of a run on the splits that it measured after several epochs."""
    for split in ("test", "validation"):
        values = [(point.minutes, getattr(point, split)) for point in run.curve or ()]
        points = tuple((minutes, accuracy) for minutes, accuracy in values if accuracy is not None)
        if len(points) > 1:
            yield AccuracyCurve(run.id, split, points)
