"""The catalogue: every experiment that the documents quote. Nothing is read here, so a listed config need not exist yet.

To add an experiment, add a line to its table. Settings are written as on the command line.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

Kind = Literal["reference", "recipe", "ablation"]


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A config with overrides, trained once per seed.

    Args:
        id: names its run folders and records.
        config: path of a shipped config.
        seeds: the seeds it is run with by default.
    """

    kind: ClassVar[Kind]
    id: str
    config: str
    settings: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)


@dataclass(frozen=True, kw_only=True)
class Reference(Experiment):
    """A result of a reference implementation: the accuracies that it reports, in per cent."""

    kind = "reference"
    test: float
    validation: float | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe(Experiment):
    """A config of this project, and the test accuracy that it is meant to reach, in per cent."""

    kind = "recipe"
    seeds: tuple[int, ...] = (0, 1, 2)
    target: float | None = None


@dataclass(frozen=True, kw_only=True)
class Ablation(Experiment):
    """One change to a recipe.

    Args:
        change: what differs from the run `base`, in words.
        changed: the settings among `settings` that differ from it; for that run itself, from the recipe.
        base: id of the run without the change; its own id if this is that run.
        alternative: the change replaces a setting by another, or adds one; otherwise it leaves a setting out.
    """

    kind = "ablation"
    change: str
    changed: tuple[str, ...]
    base: str
    alternative: bool

    @property
    def is_base(self) -> bool:
        return self.id == self.base


def _reference(id: str, *, test: float, validation: float | None = None) -> Reference:
    return Reference(id=id, config=f"configs/seeds/{id}.toml", test=test, validation=validation)


Changes = dict[str, tuple[str, tuple[str, ...]]]
"""By the end of its id, each change in words and its settings."""


def _ablations(recipe: str, *, shared: tuple[str, ...], left_out: Changes, alternatives: Changes) -> Iterator[Ablation]:
    """Yield the run without a change, then one run per change.

    Args:
        shared: settings of all runs: a validation split and what makes them short.
    """
    base = f"{recipe}-base"
    plain = Ablation(
        id=base,
        config=f"configs/{recipe}.toml",
        settings=shared,
        change="base",
        changed=shared,
        base=base,
        alternative=False,
    )
    yield plain
    for name, (change, changed) in (left_out | alternatives).items():
        names = {text.partition("=")[0] for text in changed}
        kept = tuple(text for text in shared if text.partition("=")[0] not in names)
        yield replace(
            plain, id=f"{recipe}-{name}", settings=kept + changed, change=change, changed=changed,
            alternative=name in alternatives,
        )  # fmt: skip


REFERENCES = (
    _reference("I-10", test=79.46),
    _reference("I-50", test=85.87),
    _reference("A-10", test=68.80),
    _reference("S1-10", test=78.7, validation=78.7),
    _reference("S1-100", test=42.5, validation=41.3),
    _reference("S2-10", test=75.4, validation=75.2),
    _reference("S2-100", test=35.7, validation=35.4),
    _reference("S3-10", test=79.6, validation=78.6),
)

RECIPES = (
    Recipe(id="cifar10_fast", config="configs/cifar10_fast.toml", target=94.0),
    Recipe(id="cifar10_best", config="configs/cifar10_best.toml", target=95.0),
    Recipe(id="cifar100_fast", config="configs/cifar100_fast.toml", target=73.0),
    Recipe(id="cifar100_best", config="configs/cifar100_best.toml", target=75.0),
    Recipe(id="improved_10", config="configs/improved_alexnet_10.toml", target=85.0),
    Recipe(id="improved_50", config="configs/improved_alexnet_50.toml", target=90.0),
)

LOW_RES = ("--epochs=13", "--data.augment.low_res_epochs=6", "--data.augment.low_res_side=24")
BATCH_500 = ("--global_batch_size=500", "--optim.lr=0.05", "--optim.momentum=0.9")

# An ablation is compared on validation images, so that the test images choose nothing. The networks are narrower than those
# of the recipes, and train for fewer epochs.
ABLATIONS = (
    *_ablations(
        "cifar10_fast",
        shared=("--data.validation_fraction=0.2", "--model.widths=[32, 128, 128]", "--epochs=5"),
        left_out={
            "no_flip": ("no flips", ("--data.augment.flip=false",)),
            "no_crop": ("no crops", ("--data.augment.crop=0", "--data.augment.crop_padding=zero")),
            "no_whitening": ("first layer trained, not whitened", ("--model.whitening=false",)),
            "equal_bias_lr": ("biases at the rate of the last layer", ("--optim.bias_lr_factor=1",)),
            "no_smoothing": ("no label smoothing", ("--loss.label_smoothing=0",)),
            "no_shift_tta": ("no shifted views of test images", ("--evaluation.shift_tta=0",)),
            "no_tta": ("no views of test images", ("--evaluation.flip_tta=false", "--evaluation.shift_tta=0")),
        },
        alternatives={
            "random_flip": ("flips at random, not in turns", ("--data.augment.flip=true",)),
            "zero_border": ("crops with a black border", ("--data.augment.crop_padding=zero",)),
            "crop_4": ("crops of up to 4 pixels", ("--data.augment.crop=4",)),
            "gelu": ("GELU instead of ReLU", ("--model.activation=gelu",)),
            "ema": ("averaged weights", ("--optim.ema_decay=0.99",)),
            "cosine": ("cosine schedule", ("--schedule.name=cosine",)),
            "batch_2000": (
                "batches of 2,000 at the rates of Jordan 2024",
                ("--global_batch_size=2000", "--optim.lr=0.24", "--optim.momentum=0.6"),
            ),
            "sgd_slow": ("SGD instead of Muon, lr 0.03", ("--optim={name = 'sgd', lr = 0.03, bias_lr_factor = 4}",)),
            "sgd": ("SGD instead of Muon, lr 0.1", ("--optim={name = 'sgd', lr = 0.1, bias_lr_factor = 4}",)),
            "sgd_fast": ("SGD instead of Muon, lr 0.4", ("--optim={name = 'sgd', lr = 0.4, bias_lr_factor = 4}",)),
        },
    ),
    *_ablations(
        "cifar10_best",
        shared=("--data.validation_fraction=0.2", "--model.widths=[32, 128, 128]", "--epochs=10"),
        left_out={"relu": ("ReLU instead of GELU", ("--model.activation=relu",))},
        alternatives={
            "low_res": ("13 epochs, the first six at 24 x 24 pixels, which take as long", LOW_RES),
            "batch_500": ("batches of 500 at the rates of cifar10_fast", BATCH_500),
            "batch_500_low_res": ("the same, and 13 epochs, the first six at 24 x 24 pixels", (*BATCH_500, *LOW_RES)),
            "batch_500_low_res_20": (
                "the same, at 20 x 20 pixels",
                (*BATCH_500, *LOW_RES[:2], "--data.augment.low_res_side=20"),
            ),
        },
    ),
)

CATALOGUE: dict[str, Experiment] = {found.id: found for found in (*REFERENCES, *RECIPES, *ABLATIONS)}
KINDS: tuple[Kind, ...] = ("reference", "recipe", "ablation")


def chosen(names: list[str]) -> list[Experiment]:
    """Return the experiments with these ids or of these kinds, each once, in the order of the catalogue."""
    return [found for found in CATALOGUE.values() if found.id in names or found.kind in names]
