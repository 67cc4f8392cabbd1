"""A run's story in sentences: what it is, how it went, what the learning rate did and why. Imports no torch."""

from datetime import timedelta
from itertools import pairwise

from distributed.config.schedules import Constant, Cosine, OneCycle, Plateau
from distributed.report.history import Attempt, History


def what_it_is(run: History) -> str:
    """One paragraph: network, data, length, hardware, outcome."""
    config = run.config
    held_out = f", {config.data.validation_fraction:.0%} of them held out for validation" if (
        config.data.validation_fraction
    ) else ""  # fmt: skip
    said = [
        f"A network of the kind {config.model.name} was trained on the images of {config.data.name}{held_out}, "
        f"for {len(run.epochs)} of {config.epochs} epochs in batches of {config.global_batch_size}, "
        f"with {config.optim.name} at a learning rate of up to {config.peak_lr:g} in {config.precision}."
    ]
    if run.attempts:
        said.append(f"It ran on {run.attempts[-1].hardware}.")
    if best := run.best("validation"):
        said.append(f"Its best validation accuracy is {best[1]:.2%}, after epoch {best[0]}.")
    epochs, accuracies = run.curve("test", "accuracy")
    if epochs:
        said.append(
            f"When the test images were last looked at, after epoch {epochs[-1]}, {accuracies[-1]:.2%} were right."
        )
    if config.data.name.startswith("generated"):
        said.append("These images are generated: their accuracy says nothing about real photographs.")
    return " ".join(said)


def how_it_stands(run: History) -> str:
    """Its status in one sentence."""
    status, step = run.status, run.status.step
    at = f" at step {step:,}" if step is not None else ""
    reason = f": {status.reason}" if status.reason else ""
    match status.status:
        case "finished":
            early = len(run.epochs) < run.config.epochs and run.config.early_stopping is not None
            return f"The run is finished{at}{', stopped early since validation no longer improved' if early else ''}."
        case "stopped":
            return f"The run was stopped on request{at}{reason}. The same command goes on from there."
        case "failed":
            return f"The run failed{at}{reason}. The same command goes on from the last checkpoint."
        case "running":
            return (
                f"The run was going on when this page was made, or was killed without a word; "
                f"its newest checkpoint is{at or ' not written yet'}."
            )
        case _:
            return "The run's folder does not say how it stands."


def how_it_ended(attempt: Attempt, *, last: bool) -> str:
    """Why an attempt ended, for the table of attempts."""
    if attempt.ended is None:
        return "no end was written: it still runs, or was killed" if last else "killed: no end was written"
    reason, event = attempt.ended.reason, attempt.ended.event
    return f"{event}: {reason}" if reason else event


def clock(time: timedelta) -> str:
    """`1 h 02 min`, `4 min 05 s`, `12 s`."""
    minutes, seconds = divmod(round(time.total_seconds()), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"


def learning_rate(run: History) -> list[str]:
    """What the schedule is, and each change that validation brought about."""
    schedule, peak = run.config.schedule, run.config.peak_lr
    match schedule:
        case Constant():
            warmup = f" after a linear rise over {schedule.warmup_epochs:g} epochs" if schedule.warmup_epochs else ""
            return [f"The learning rate stays at {peak:g}{warmup}."]
        case Cosine():
            warmup = f"rises linearly to {peak:g} over {schedule.warmup_epochs:g} epochs, then " if (
                schedule.warmup_epochs
            ) else ""  # fmt: skip
            return [
                f"The learning rate {warmup}falls along half a cosine to {peak * schedule.final_factor:g} at the end."
            ]
        case OneCycle():
            return [
                f"One cycle: the learning rate rises from {peak * schedule.start_factor:g} to {peak:g} over the first "
                f"{schedule.warmup_fraction:.0%} of all steps, then falls to {peak * schedule.final_factor:g} at the end."
            ]
        case Plateau():
            return _plateau(run, schedule)


def drops(run: History) -> list[tuple[int, float, float]]:
    """(epoch counted from 1 after which it came, rate before, rate after) of every drop of a plateau schedule."""
    rates = [(line.epoch + 1, line.lr) for line in run.epochs if line.lr is not None]
    pairs = pairwise(rates)
    return [(epoch, before, after) for (epoch, before), (_, after) in pairs if after < before]


def _plateau(run: History, schedule: Plateau) -> list[str]:
    metric = schedule.metric
    least = f" by more than {schedule.min_delta:g}" if schedule.min_delta else ""
    when = f"has not improved{least} for {schedule.patience + 1} epochs in a row" if (
        schedule.patience
    ) else f"of an epoch is no improvement{least}"  # fmt: skip
    said = [
        f"The learning rate starts at {run.config.peak_lr:g} and is multiplied by {schedule.factor:g} whenever validation "
        f"{metric} {when}" + (f", {schedule.max_drops} times at the most." if schedule.max_drops is not None else ".")
    ]
    epochs, values = run.curve("validation", metric)
    for epoch, before, after in drops(run):
        seen = [(e, v) for e, v in zip(epochs, values, strict=True) if e <= epoch]
        if not seen:
            continue
        best_epoch, best = max(seen, key=lambda p: p[1] if metric == "accuracy" else -p[1])
        value = f"{best:.2%}" if metric == "accuracy" else f"{best:.4f}"
        ago = epoch - best_epoch
        said.append(
            f"After epoch {epoch} it fell from {before:g} to {after:g}: the best validation {metric}, {value}, was that of "
            f"epoch {best_epoch}, {ago} epoch{'s' if ago != 1 else ''} before."
        )
    if not drops(run):
        said.append("It has not fallen yet.")
    return said
