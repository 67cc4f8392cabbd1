"""The recipe: a whole training run, from top to bottom."""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import torch
from loguru import logger

from distributed.attempt import Attempt
from distributed.build import build_data, build_engine, build_step, check_same_config, log_plan
from distributed.checkpoint.checkpointer import Checkpointer
from distributed.checkpoint.save_budget import SaveBudget
from distributed.checkpoint.warm_start import start_from
from distributed.comm.process_group import choose_device, process_group
from distributed.config import TrainConfig
from distributed.data.checks import check_data
from distributed.metrics.profiler import StepProfiler
from distributed.metrics.records import Sink
from distributed.metrics.reporter import Reporter, open_sinks
from distributed.optim.schedules import build_early_stopping, build_schedule
from distributed.process.logs import replace_default_logs
from distributed.run.resume_checks import check_saved
from distributed.topology import Topology
from distributed.training.determinism import make_deterministic
from distributed.training.state import TrainState
from distributed.training.steps import evaluate
from distributed.training.stop import Never, StepAgreement, StopSource
from distributed.training.totals import MetricAccumulator


def train(config: TrainConfig, *, stop: StopSource | None = None, sinks: Sequence[Sink] = ()) -> TrainState:
    """Train as the config says, from the newest checkpoint in its run folder if there is one.

    Every rank calls this with the same config. torchrun, Slurm, Ray and the tests all do.

    Args:
        stop: where a request to stop comes from; all ranks then agree on a step, save there and return.
        sinks: further places where metrics are announced, on every rank.

    Returns:
        Where the run stands; `stop_reason` is set if it was stopped before its end.

    Raises:
        InputError: data, run folder or device cannot be used, or the ranks were given different configs or data.
        NotFiniteError: the loss became infinite or no number.
        StorageError: a checkpoint could not be written; the one before is intact.
    """
    topology = Topology.from_environment()
    replace_default_logs(topology.rank, level=config.logging.level)
    torch.set_num_threads(topology.threads(config.threads))
    device = choose_device(config.device, topology)
    make_deterministic(device, precision=config.precision, compile=config.compile)
    with ExitStack() as stack:
        attempt = stack.enter_context(Attempt(config, topology))
        data = build_data(config, topology, device)  # before the group: a damaged file must not leave peers waiting
        stack.enter_context(process_group(topology, device, timeout_seconds=config.timeout_seconds))
        check_same_config(config)
        attempt.open_log()
        check_data(config, data)

        engine = build_engine(config, topology, data, device)
        steps_per_epoch, total_steps = data.steps_per_epoch, config.epochs * data.steps_per_epoch
        schedule = build_schedule(config, steps_per_epoch=steps_per_epoch)
        state = TrainState(schedule, build_early_stopping(config.early_stopping), config.precision)
        facts = attempt.facts(device) | data.facts()
        checkpoints = Checkpointer(
            attempt.folder.checkpoints,
            attempt.run,
            keep_last=config.checkpoint.keep_last,
            facts=facts,
            upload_to=config.checkpoint.upload_to,
            budget=SaveBudget(config.checkpoint.max_overhead),
        )
        check = partial(check_saved, config=config, images=data.size("train"))
        resumed_from = checkpoints.restore(engine, state, check=check)
        if resumed_from is None and config.init_from:
            start_from(config.init_from, engine)
        attempt.begin(state, resumed_from=resumed_from, facts=facts)
        log_plan(config, data, topology, state, device)

        if attempt.run:
            sinks = [*open_sinks(config, attempt.run, state, total_steps=total_steps), *sinks]
        report = stack.enter_context(Reporter(sinks, total_steps=total_steps, device=device))
        agreement = stack.enter_context(
            StepAgreement(
                stop or Never(), is_main=topology.is_main, save_every_seconds=60 * config.checkpoint.every_minutes
            )
        )
        profiled_steps = config.logging.profile_steps if topology.is_main else 0
        profiler = stack.enter_context(StepProfiler(profiled_steps, attempt.folder.profile, attempt.check_ours))
        sums = MetricAccumulator(device)
        train_step = build_step(config, engine, sums, device)
        measure = partial(evaluate, engine, data, flip_tta=config.evaluation.flip_tta, device=device)

        while state.epoch < config.epochs and not state.stopped_early:
            report.epoch_begins(state)
            batches = data.train_epoch(state.epoch, start_step=state.step_in_epoch)
            for micro_batches in report.meter.waiting(batches):
                lr = state.schedule.lr(state.step)
                grad_norm = train_step(micro_batches, lr=lr, step=state.step)
                state.step_done(micro_batches[0].step_size)
                profiler.step_done()
                stop_now, save_now = agreement.after_step()
                if state.step % config.logging.every_steps == 0:
                    state.take(sums.read())
                    report.train(state, state.close_window(), grad_norm=grad_norm, lr=lr)
                if stop_now or save_now or config.checkpoint.is_due(state.step):
                    state.take(sums.read())
                    checkpoints.save(engine, state)
                if stop_now:
                    checkpoints.wait(stopping=True)
                    state.stop_reason = agreement.reason
                    return state
            # Not the loop's variables from here on: an attempt may begin where an epoch's steps are all done.
            state.take(sums.read())
            state.close_window()
            lr = state.schedule.lr(state.step - 1)
            validation = measure("validation") if data.size("validation") else None
            is_best, decisions = state.observe(validation, best_by=config.best_by)
            for decision in decisions:
                logger.info(decision)
            ends = state.epoch + 1 == config.epochs or state.stopped_early
            test_now = config.evaluation.test_every_epoch or ends
            test = measure("test") if test_now else None
            report.epoch(state, lr=lr, validation=validation, test=test, is_best=is_best)
            if state.schedule.restore_best_now:
                checkpoints.restore_best(engine, state)
            state.epoch_done()
            if checkpoints.save_epoch(engine, state, is_best=is_best, ends=ends):
                agreement.saved()
        checkpoints.wait()
        return state
