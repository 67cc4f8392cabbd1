"""The tables of `bench scaling`, in Markdown, which a terminal shows as well."""

from collections.abc import Sequence

from distributed.bench.scaling import (
    CHECK,
    COMPUTE,
    EXCHANGE,
    MODES,
    NO_CORE,
    OTHER_THREADS,
    PROCESSES,
    Rounds,
    check_name,
    medians,
    model_of,
    name_of,
    points_of,
)  # fmt: skip
from distributed.bench.scaling_model import BATCH, StepModel, residuals
from distributed.documents import markdown

PREDICTED_CORES = (2, 4, 8)
BUSY = 0.03


def report(rounds: Rounds, *, cores: int, predicted_cores: Sequence[int]) -> str:
    """Return the shares of the measured steps, then each mode's model and its predictions."""
    models = {mode: model for mode in MODES if (model := model_of(rounds, mode, cores=cores))}
    parts = [
        *busy(rounds),
        shares(rounds),
        *(described(rounds, mode, model, cores=cores) for mode, model in models.items()),
    ]
    if models:
        parts.append(predictions(models, predicted_cores))
    return "\n\n".join(parts)


def busy(rounds: Rounds) -> list[str]:
    """Return a warning if a single process often had no core, else nothing."""
    found = medians(rounds)
    shares = [found[name + NO_CORE] / found[name] for mode in MODES if (name := name_of(mode, 1)) in found]
    if max(shares, default=0.0) < BUSY:
        return []
    return [f"warning: a single process had no core for {max(shares):.0%} of the time: other programs use this machine"]


def shares(rounds: Rounds) -> str:
    """Return the table of measured steps: medians over the rounds."""
    found = medians(rounds)
    names = [name for mode in MODES for name in (*(name_of(mode, n) for n in PROCESSES), check_name(mode))]
    header = ["", "ms/step", "images/s", "compute", "exchange", "waiting", "of that, for a core", "other threads, ms"]
    rows = []
    for name in names:
        if name in found:
            wall, compute, exchange = found[name], found[name + COMPUTE], found[name + EXCHANGE]
            fractions = [compute, exchange, max(0.0, wall - compute - exchange), min(wall, found[name + NO_CORE])]
            rows.append([
                name, f"{wall:.1f}", f"{1000 * BATCH / wall:,.0f}", *(f"{time / wall:.0%}" for time in fractions),
                f"{found[name + OTHER_THREADS]:.1f}",
            ])  # fmt: skip
    return markdown.table(header, rows)


def described(rounds: Rounds, mode: str, model: StepModel, *, cores: int) -> str:
    """Return a model's formula with its coefficients, how well it fits, and its check on one core."""
    errors = residuals(model, points_of(rounds, mode, cores=cores))
    fits = markdown.listed([f"{error:+.1%} at {processes}" for processes, error in errors.items()])
    text = (
        f"{mode.capitalize()} mode: ms/step = r x ({model.fixed:.1f} + {model.per_image:.3f} x images + "
        f"{model.exchange:.2f} + {model.per_peer:.2f} x (processes - 1)) + {model.synchronizing:.1f} + "
        f"{model.sharing:.1f} x (r - 1). Measured against model: {fits} processes."
    )
    if measured := medians(rounds).get(check_name(mode)):
        predicted = model.step(CHECK, 1)
        text += (
            f" Not used for the fit: {CHECK} processes on one core take {measured:.1f} ms, and the model says "
            f"{predicted:.1f} ({measured / predicted - 1:+.1%})."
        )
    return markdown.paragraph(text)


def predictions(models: dict[str, StepModel], predicted_cores: Sequence[int]) -> str:
    """Return the table of predicted images/s."""
    header = ["predicted images/s", *(f"{n} process{'es' if n > 1 else ''}" for n in PROCESSES)]
    rows = [
        [f"{mode}, {cores} core{'s' if cores > 1 else ''}"]
        + [f"{1000 * BATCH / model.step(processes, cores):,.0f}" for processes in PROCESSES]
        for mode, model in models.items()
        for cores in predicted_cores
    ]
    return markdown.table(header, rows)
