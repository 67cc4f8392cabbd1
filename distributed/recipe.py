"""The recipe: a complete training run, from top to bottom."""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import torch
from loguru import logger

from distributed.attempt import Attempt
from distributed.build import build_checkpointer, build_data, build_engine, log_plan
from distributed.checkpoint.download import saved_content
from distributed.comm.process_group import choose_device, process_group
from distributed.comm.same_config import check_same_config
from distributed.config import TrainConfig
from distributed.config.given import check_arguments, with_given
from distributed.data.checks import check_data
from distributed.data.sources.arrays import GivenArrays
from distributed.inference.result import TrainResult
from distributed.metrics.imported_sinks import open_sinks
from distributed.metrics.profiler import StepProfiler
from distributed.metrics.records import Sink
from distributed.metrics.reporter import Reporter, default_sinks
from distributed.models.imported import GivenModel
from distributed.network import build_initial_network
from distributed.optim.schedules import build_early_stopping, build_schedule
from distributed.process.allocator import keep_freed_memory
from distributed.process.gc_pause import then_collect_garbage
from distributed.process.logs import replace_default_logs
from distributed.run.resume_checks import check_saved
from distributed.topology import Topology
from distributed.training.determinism import make_deterministic, restored_settings
from distributed.training.functions import build_functions
from distributed.training.losses import PerSample
from distributed.training.precision import with_precision
from distributed.training.state import TrainState
from distributed.training.step_function import build_step
from distributed.training.steps import evaluate
from distributed.training.stop import NeverStop, StepAgreement, StopSource
from distributed.training.totals import TotalsAccumulator
from distributed.training.views import Views


@then_collect_garbage
def train(
    config: TrainConfig,
    *,
    model: GivenModel | None = None,
    data: GivenArrays | None = None,
    loss: PerSample | None = None,
    stop: StopSource | None = None,
    sinks: Sequence[Sink] = (),
) -> TrainResult:
    """Train as configured, resuming from the newest checkpoint in the run folder if there is one.

    Every rank calls this with the same config, whether torchrun, Slurm, Ray or a test started it.

    Args:
        model: the network, in place of the config's: a function or class called as model(num_classes=N), or a module, of
            which a copy is trained.
        data: the images and labels, in place of the config's: a dict of the arrays train_images, train_labels, test_images
            and test_labels.
        loss: the loss, in place of the config's: a function that returns one loss per sample, called as loss(logits, targets).
        stop: source of stop requests. All ranks agree on the step at which to stop, save a checkpoint there and return.
        sinks: additional metric sinks, called on rank 0; on every rank if they have `on_every_rank = True`.

    Returns:
        How the run ended, its network and its metrics. `stop_reason` is set if it was stopped before its end.

    Raises:
        InputError: an argument, the data, run folder or device cannot be used, or the ranks' configs or data differ.
        NotFiniteError: the loss or a gradient became infinite or NaN.
        StorageError: a checkpoint could not be written. The previous one is intact.
        PeerError: another rank failed or was lost.
    """
    check_arguments(config, stop=stop, sinks=sinks)
    config = with_given(config, model=model, data=data, loss=loss)
    topology = Topology.from_environment()
    replace_default_logs(topology.rank, level=config.logging.level)
    keep_freed_memory()
    device = choose_device(config.device, topology)
    with ExitStack() as stack:
        stack.enter_context(restored_settings())
        torch.set_num_threads(topology.threads(config.threads))
        make_deterministic(device, precision=config.precision, compile=config.compile)
        attempt = stack.enter_context(Attempt(config, topology))
        # Before the process group, so that bad data, networks, functions and sinks leave no peer waiting.
        own_sinks = open_sinks(config) if topology.is_main else []
        pipeline = build_data(config, topology, device, data)
        functions = build_functions(config, topology, pipeline, device, loss)
        network = build_initial_network(config, topology, pipeline, model)
        stack.enter_context(process_group(topology, device, timeout_seconds=config.timeout_seconds))
        check_same_config(config)
        config = attempt.config = with_precision(config, device, saved_content)
        attempt.open_log()
        check_data(config, pipeline)

        engine = build_engine(config, topology, pipeline, device, network)
        schedule = build_schedule(config, steps_per_epoch=pipeline.steps_per_epoch)
        state = TrainState(schedule, build_early_stopping(config.early_stopping), config.precision)
        metadata = attempt.metadata(device, engine) | pipeline.metadata()
        checkpoints = build_checkpointer(config, attempt.run, metadata)
        validate = partial(check_saved, config=config, images=pipeline.size("train"))
        resumed_from = checkpoints.resume(engine, state, validate=validate)
        checkpoints.metadata |= attempt.begin(state, resumed_from=resumed_from, metadata=metadata)
        log_plan(config, topology, pipeline, device, state)

        total_steps = config.epochs * pipeline.steps_per_epoch
        sinks = [sink for sink in sinks if topology.is_main or getattr(sink, "on_every_rank", False)]
        if attempt.run:
            sinks = [*default_sinks(config, attempt.run, state, total_steps=total_steps), *own_sinks, *sinks]
        report = stack.enter_context(Reporter(sinks, total_steps=total_steps, device=device))
        agreement = StepAgreement(
            stop or NeverStop(), is_main=topology.is_main, save_every_seconds=60 * config.checkpoint.every_minutes,
            timeout_seconds=config.timeout_seconds,
        )  # fmt: skip
        stack.enter_context(agreement)
        profiled_steps = config.logging.profile_steps if topology.is_main else 0
        profiler = stack.enter_context(StepProfiler(profiled_steps, attempt.folder.profile, attempt.check_token))
        totals = TotalsAccumulator(device)
        train_step = build_step(config, engine, totals, device, functions.loss.training)
        evaluate_split = partial(
            evaluate, engine, pipeline, loss=functions.loss.evaluation, metrics=functions.metrics,
            views=Views.of(config.evaluation), device=device,
        )  # fmt: skip

        while state.epoch < config.epochs and not state.stopped_early:
            report.begin_epoch(state)
            batches = pipeline.train_epoch(state.epoch, start_step=state.step_in_epoch)
            for micro_batches in report.meter.time_waits(batches):
                lr = schedule.lr(state.step)
                grad_norm = train_step(micro_batches, lr=lr, step=state.step)
                state.finish_step(micro_batches[0].global_count)
                profiler.step()
                stop_now, save_now = agreement.after_step()
                if state.step % config.logging.every_steps == 0:
                    state.add(totals.read())
                    report.log_step(state, state.pop_window(), grad_norm=grad_norm, lr=lr)
                if stop_now or save_now or config.checkpoint.is_due(state.step):
                    state.add(totals.read())
                    checkpoints.save(engine, state)
                    agreement.restart_save_timer()
                if stop_now:
                    checkpoints.wait(stopping=True)
                    state.stop_reason = agreement.reason
                    return TrainResult.of(config, state, model)
            # From here on the loop's variables may be unset: an attempt can resume after an epoch's last step.
            state.add(totals.read())
            state.pop_window()
            lr = schedule.lr(state.step - 1)
            validation = evaluate_split("validation") if pipeline.size("validation") else None
            is_best, decisions = state.observe(validation, best_by=config.best_by)
            for decision in decisions:
                logger.info(decision)
            is_last = state.epoch + 1 == config.epochs or state.stopped_early
            test = evaluate_split("test") if is_last or config.evaluation.test_every_epoch else None
            report.log_epoch(state, lr=lr, validation=validation, test=test, is_best=is_best)
            if schedule.restore_best_now:
                checkpoints.restore_best(engine, state)
            state.finish_epoch()
            if checkpoints.save_epoch(engine, state, is_best=is_best, is_last=is_last):
                agreement.restart_save_timer()
        checkpoints.wait()
        return TrainResult.of(config, state, model)
