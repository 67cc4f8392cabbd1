"""Describes a run in sentences: setup, outcome, attempts, learning rate. Imports no torch."""

from datetime import timedelta

from distributed.config.data import CifarData, GeneratedData
from distributed.config.schedules import Constant, Cosine, Linear, OneCycle, Plateau
from distributed.errors import ExitCode
from distributed.report.history import Attempt, History


def describe(run: History) -> str:
    """Describe network, data, length, hardware and results in one paragraph."""
    config = run.config
    fraction = config.data.validation_fraction
    held_out = f" {fraction:.0%} of the training images are held out for validation." if fraction else ""
    sentences = [
        f"{config.model.name} on {dataset_name(run)}: {run.progress}, batch size {config.global_batch_size}, "
        f"optimizer {config.optim.name}, peak learning rate {config.peak_lr:g}, precision {config.precision}.{held_out}"
    ]
    if started := run.started_attempts:
        sentences.append(f"Hardware: {started[-1].hardware}.")
    if best := run.log.best("validation"):
        sentences.append(f"Best validation accuracy: {best.value:.2%} (epoch {best.epoch}).")
    if test := run.log.last("test"):
        sentences.append(f"Last test accuracy: {test.value:.2%} (epoch {test.epoch}).")
    if isinstance(config.data, GeneratedData):
        sentences.append("The images are generated: accuracy on them says nothing about real photographs.")
    return " ".join(sentences)


def dataset_name(run: History) -> str:
    """Return the name of the run's data set as people write it, e.g. CIFAR-10."""
    data = run.config.data
    return f"CIFAR-{data.name.removeprefix('cifar')}" if isinstance(data, CifarData) else data.name


def describe_status(run: History) -> str:
    """Describe the run's status in one sentence or two."""
    status, step = run.status, run.status.step
    at = f" at step {step:,}" if step is not None else ""
    reason = f": {status.reason}" if status.reason else ""
    match status.status:
        case "finished":
            early = run.log.finished_epochs < run.config.epochs and run.config.early_stopping is not None
            why = ", stopped early because validation no longer improved" if early else ""
            return f"The run finished{at}{why}."
        case "stopped":
            return f"The run was stopped on request{at}{reason}. The same command resumes it."
        case "failed":
            again = (
                "would fail again: first change what the message names"
                if status.exit_code in (ExitCode.BAD_INPUT, ExitCode.NOT_FINITE)
                else "resumes it from its last checkpoint"
            )
            return f"The run failed{at}{reason}. The same command {again}."
        case "running":
            newest = f"is of step {status.saved_step:,}" if status.saved_step else "has not been written yet"
            return f"When this page was generated, the run was in progress or killed; its newest checkpoint {newest}."
        case _:
            return "The run folder does not record a status."


def describe_end(attempt: Attempt, *, last: bool) -> str:
    """Describe why an attempt ended, for the table of attempts."""
    if attempt.ended is None:
        return "no end recorded: still running, or killed" if last else "killed: no end recorded"
    reason, event = attempt.ended.reason, attempt.ended.event
    return f"{event}: {reason}" if reason else event


def clock(time: timedelta) -> str:
    """Format a duration as `1 h 02 min`, `4 min 05 s` or `12 s`."""
    minutes, seconds = divmod(round(time.total_seconds()), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"


def describe_learning_rate(run: History) -> list[str]:
    """Describe the schedule, then each drop that validation triggered."""
    schedule, peak = run.config.schedule, run.config.peak_lr
    match schedule:
        case Constant():
            warmup = f" after a linear warmup of {_epochs(schedule.warmup_epochs)}" if schedule.warmup_epochs else ""
            return [f"The learning rate is constant at {peak:g}{warmup}."]
        case Cosine() | Linear():
            warmup = f"rises linearly to {peak:g} over {_epochs(schedule.warmup_epochs)}, then " if (
                schedule.warmup_epochs
            ) else ""  # fmt: skip
            falls = "follows a cosine" if isinstance(schedule, Cosine) else "falls linearly"
            return [f"The learning rate {warmup}{falls} down to {peak * schedule.final_factor:g} at the end."]
        case OneCycle():
            return [
                f"One cycle: the learning rate rises from {peak * schedule.start_factor:g} to {peak:g} over the first "
                f"{schedule.warmup_fraction:.0%} of all steps, then falls to {peak * schedule.final_factor:g} at the end."
            ]
        case Plateau():
            return _describe_plateau(run, schedule)


def _epochs(count: float) -> str:
    return f"{count:g} epoch{'' if count == 1 else 's'}"


def _describe_plateau(run: History, schedule: Plateau) -> list[str]:
    metric, peak = schedule.metric, run.config.peak_lr
    margin = f" by more than {schedule.min_delta:g}" if schedule.min_delta else ""
    limit = f", at most {schedule.max_drops} times" if schedule.max_drops is not None else ""
    if schedule.max_drops == 1:
        limit = ", at most once"
    wait = schedule.patience + 1
    when = (
        f"has not improved{margin} for {wait} epochs in a row" if wait > 1 else f"has not improved{margin} in an epoch"
    )
    sentences = [
        f"The learning rate starts at {peak:g} and is multiplied by {schedule.factor:g} whenever validation {metric} "
        f"{when}{limit}."
    ]
    curve, drops = run.log.curve("validation", metric), run.log.lr_drops()
    for drop in drops:
        seen = [point for point in curve if point.epoch <= drop.epoch]
        if not seen:
            continue
        best = max(seen, key=lambda point: point.value if metric == "accuracy" else -point.value)
        value = f"{best.value:.2%}" if metric == "accuracy" else f"{best.value:.4f}"
        sentences.append(
            f"After epoch {drop.epoch} it dropped from {drop.before:g} to {drop.after:g}: the best validation {metric}, "
            f"{value}, was reached {_epochs(drop.epoch - best.epoch)} earlier, in epoch {best.epoch}."
        )
    return sentences if drops else [*sentences, "It has not dropped yet."]
