"""A stopped run resumes as if it had not stopped: the same bits, every image once, the same decisions."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from kit.ranks import in_group, run_ranks
from kit.small_runs import FAST, Recorder, StopAfter, digest, lines, newest_checkpoint, small_config, state_of
from loguru import logger

from distributed.comm import collectives, shared_sum
from distributed.config import TrainConfig
from distributed.data.batch import Batch
from distributed.data.pipeline import DataPipeline
from distributed.recipe import train
from distributed.run.folder import RunFolder

IMAGES, HELD_OUT = 200, 40
STEPS_PER_EPOCH = 7
STEPS = 2 * STEPS_PER_EPOCH


MODES: dict[str, dict[str, int]] = {"fast": FAST, "exact": {"shards": 8}}
STOP_AFTER = {"fast": 9, "exact": 5}
"""Steps. The ranks stop one later: in fast mode between two saves of the second epoch, in exact mode on a step with a save."""


def config_of(run_dir: Path, **settings: Any) -> TrainConfig:
    """160 images in batches of 24, the last of 16, two micro-batches per step, and a save every three steps.

    The mode is the name of the run folder's parent.
    """
    return small_config(
        run_dir,
        grad_accum_steps=2,
        exact=MODES[run_dir.parent.name],
        data={"train_samples": IMAGES, "validation_fraction": HELD_OUT / IMAGES},
        schedule={"name": "one_cycle"},
        optim={"lr": 0.1},
        checkpoint={"every_minutes": 0.0, "every_steps": 3, "keep_last": 2},
        **settings,
    )


Seen = Counter[tuple[int, int]]
"""Number of times each (epoch, sample id) was trained on."""


class RecordingIds:
    """Context manager that counts the samples in the training batches passed to the recipe."""

    def __enter__(self) -> Seen:
        seen: Seen = Counter()
        self.original = original = DataPipeline.train_epoch

        def train_epoch(self: DataPipeline, epoch: int, *, start_step: int = 0) -> Iterator[list[Batch]]:
            for batches in original(self, epoch, start_step=start_step):
                seen.update((epoch, int(sample)) for batch in batches for sample in batch.sample_ids)
                yield batches

        DataPipeline.train_epoch = train_epoch  # type: ignore[method-assign]
        return seen

    def __exit__(self, *_: object) -> None:
        DataPipeline.train_epoch = self.original  # type: ignore[method-assign]


@dataclass(frozen=True)
class Attempt:
    """The result of one attempt on one rank."""

    step: int
    stop_reason: str | None
    seen: Seen


def attempt(config: TrainConfig, stop_after: int | None = None) -> Attempt:
    stop = StopAfter(stop_after) if stop_after and collectives.rank() == 0 else None
    with RecordingIds() as seen:
        state = train(config, stop=stop)
    return Attempt(state.step, state.stop_reason, seen)


@in_group
def run_undisturbed_and_stopped(folder: Path) -> dict[str, dict[str, Attempt]]:
    return {
        mode: {
            "undisturbed": attempt(config_of(folder / mode / "undisturbed")),
            "stopped": attempt(config_of(folder / mode / "stopped"), STOP_AFTER[mode]),
        }
        for mode in MODES
    }


@in_group
def run_to_the_end(folder: Path, *names: str) -> dict[str, dict[str, Attempt]]:
    return {mode: {name: attempt(config_of(folder / mode / name)) for name in names} for mode in MODES}


@dataclass(frozen=True)
class Scenario:
    """An undisturbed run and a stopped run on 3 ranks in one mode; copies of the stopped run are resumed in three ways.

    Attributes:
        attempts: each rank's attempt, by the name of the run. "stopped" is the first attempt of the three copies.
    """

    folder: Path
    stopped_at: int
    attempts: dict[str, list[Attempt]]

    def run(self, name: str) -> RunFolder:
        return RunFolder(self.folder / name)


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scenario]:
    folder = tmp_path_factory.mktemp("resume")
    first = run_ranks(run_undisturbed_and_stopped, 3, folder, timeout_seconds=100)
    for mode in MODES:
        for name in ("resumed", "damaged", "on-two"):
            shutil.copytree(folder / mode / "stopped", folder / mode / name, symlinks=True)
        damage(newest_checkpoint(folder / mode / "damaged") / "tensors.safetensors")
    on_three = run_ranks(run_to_the_end, 3, folder, "resumed", "damaged", timeout_seconds=100)
    on_two = run_ranks(run_to_the_end, 2, folder, "on-two", timeout_seconds=100)
    return {
        mode: Scenario(
            folder / mode,
            STOP_AFTER[mode] + 1,
            {
                name: [rank[mode][name] for rank in ranks]
                for ranks in (first, on_three, on_two)
                for name in ranks[0][mode]
            },
        )
        for mode in MODES
    }


@pytest.fixture(params=list(MODES))
def scenario(scenarios: dict[str, Scenario], request: pytest.FixtureRequest) -> Scenario:
    return scenarios[request.param]


def damage(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


pytestmark = pytest.mark.timeout(320)


def test_the_run_stopped_at_the_requested_step(scenario: Scenario) -> None:
    assert [rank.step for rank in scenario.attempts["undisturbed"]] == [STEPS] * 3
    assert [rank.step for rank in scenario.attempts["stopped"]] == [scenario.stopped_at] * 3
    assert newest_checkpoint(scenario.run("stopped").path).name.startswith(f"step-{scenario.stopped_at:08d}-")


@pytest.mark.parametrize("name", ["resumed", "damaged"])
def test_a_resumed_run_ends_with_the_same_bits(scenario: Scenario, name: str) -> None:
    """In fast mode plain DDP would not: after a start it sums the first gradients in a different order."""
    ended, expected = (newest_checkpoint(scenario.run(each).path) for each in (name, "undisturbed"))
    assert ended.name == expected.name == f"step-{STEPS:08d}-epoch-002"
    assert digest(ended / "tensors.safetensors") == digest(expected / "tensors.safetensors")
    assert state_of(scenario.run(name)) == state_of(scenario.run("undisturbed"))


@pytest.mark.parametrize("name", ["resumed", "damaged"])
def test_a_resumed_run_has_the_same_metrics(scenario: Scenario, name: str) -> None:
    expected = lines(scenario.run("undisturbed"), "train")
    assert [line["step"] for line in expected] == list(range(1, STEPS + 1))
    assert lines(scenario.run(name), "train") == expected
    assert lines(scenario.run(name), "epoch") == lines(scenario.run("undisturbed"), "epoch")
    assert len(lines(scenario.run(name), "epoch")) == 2


def test_a_run_resumes_from_before_a_damaged_newest(scenario: Scenario) -> None:
    run = scenario.run("damaged")
    previous = max(step for step in range(scenario.stopped_at) if step % 3 == 0 or step == STEPS_PER_EPOCH)
    starts = [json.loads(line) for line in (run.path / "attempts.jsonl").read_text().splitlines()]
    assert [line["step"] for line in starts if line["event"] == "started"] == [0, previous]
    (set_aside,) = run.checkpoints.glob("*.damaged")
    assert set_aside.stem == newest_checkpoint(scenario.run("stopped").path).name


@pytest.mark.parametrize("name", ["resumed", "on-two"])
def test_every_image_is_trained_on_once_across_a_stop(scenario: Scenario, name: str) -> None:
    """Sample ids in the recipe's batches, over all ranks of both attempts."""
    undisturbed = sum((rank.seen for rank in scenario.attempts["undisturbed"]), Counter())
    both = [rank.seen for each in ("stopped", name) for rank in scenario.attempts[each]]
    assert len(undisturbed) == 2 * (IMAGES - HELD_OUT)
    assert set(undisturbed.values()) == {1}
    assert sum(both, Counter()) == undisturbed


def test_a_run_stopped_on_three_ranks_finishes_on_two(scenario: Scenario) -> None:
    run = scenario.run("on-two")
    assert [(rank.step, rank.stop_reason) for rank in scenario.attempts["on-two"]] == [(STEPS, None)] * 2
    assert run.status().status == "finished"
    expected = lines(scenario.run("undisturbed"), "train")
    found = lines(run, "train")
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    assert found[: scenario.stopped_at] == expected[: scenario.stopped_at]


def test_exact_mode_on_two_ranks_ends_with_the_same_bits(scenarios: dict[str, Scenario]) -> None:
    scenario = scenarios["exact"]
    run, undisturbed = scenario.run("on-two"), scenario.run("undisturbed")
    for kind in ("train", "epoch"):
        assert lines(run, kind) == lines(undisturbed, kind)
    assert digest(newest_checkpoint(run.path) / "tensors.safetensors") == digest(
        newest_checkpoint(undisturbed.path) / "tensors.safetensors"
    )
    assert state_of(run) == state_of(undisturbed)
    log = (run.logs / "rank-0000.log").read_text()
    assert "exact mode, 8 shards: bit-identical on up to 8 processes" in log
    assert "2 ranks x 1 thread" in log
    assert "bits may differ" not in log


def test_fast_mode_warns_that_bits_may_differ(scenarios: dict[str, Scenario]) -> None:
    scenario = scenarios["fast"]
    run = scenario.run("on-two")
    # The first step on two ranks starts from the weights of three ranks: only the order of sums differs.
    first = scenario.stopped_at
    expected, found = (lines(scenario.run(name), "train") for name in ("undisturbed", "on-two"))
    assert found[first]["loss"] == pytest.approx(expected[first]["loss"], rel=1e-6)
    assert found[first]["lr"] == expected[first]["lr"]
    assert digest(newest_checkpoint(run.path) / "tensors.safetensors") != digest(
        newest_checkpoint(scenario.run("undisturbed").path) / "tensors.safetensors"
    )
    log = (run.logs / "rank-0000.log").read_text()
    assert "resuming with a different world_size: 3 before, 2 now; bits may differ" in log
    assert "2 micro-batches of 12, 6 per rank; 2 ranks" in log
    assert "fast mode: results depend on the number of processes" in log


PATIENT = {"name": "plateau", "metric": "loss", "factor": 0.5, "patience": 1, "min_delta": 50.0, "max_drops": 2}
"""Only the first epoch is an improvement: bad epochs 1 and 2, a drop, bad epochs 1 and 2, a drop, and no more."""
EPOCHS = 7


@dataclass(frozen=True)
class Decisions:
    """The decisions on a rank: the learning rate of each step, and the log line of each decision."""

    lrs: list[tuple[int, float]]
    log: list[str]
    ended: tuple[int, bool, str | None]


def decide(config: TrainConfig, stop_after: int | None = None) -> Decisions:
    recorder, log = Recorder(), []
    sink = logger.add(
        lambda message: log.append(message.record["message"]),
        filter=lambda record: record["message"].startswith(("plateau:", "early stopping:")),
    )
    stop = StopAfter(stop_after) if stop_after and collectives.rank() == 1 else None
    state = train(config, stop=stop, sinks=[recorder])
    logger.remove(sink)
    lrs = [(metrics.step, metrics.lr) for metrics in recorder.steps]
    return Decisions(lrs, log, (state.epoch, state.stopped_early, state.stop_reason))


@in_group
def wait_for_improvement(folder: Path) -> dict[str, list[Decisions]]:
    """Two steps per epoch. The second run stops within epoch 3, after its first bad epoch, and within epoch 6."""

    def config(name: str) -> TrainConfig:
        return small_config(
            folder / name,
            epochs=EPOCHS + 3,
            schedule=PATIENT,
            early_stopping={"metric": "loss", "patience": EPOCHS - 1, "min_delta": 50.0},
            data={"train_samples": 60, "validation_fraction": 0.25},
        )

    return {
        "undisturbed": [decide(config("undisturbed"))],
        "stopped twice": [decide(config("stopped"), 4), decide(config("stopped"), 5), decide(config("stopped"))],
    }


@pytest.fixture(scope="module")
def patience(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[Decisions]]]:
    return run_ranks(wait_for_improvement, 2, tmp_path_factory.mktemp("plateau"))


def test_plateau_drops_the_rate_and_stops_the_run_early(
    patience: list[dict[str, list[Decisions]]],
) -> None:
    (undisturbed,) = patience[0]["undisturbed"]
    lr = 0.01
    by_epoch = [lr, lr, lr, lr / 2, lr / 2, lr / 4, lr / 4]
    assert undisturbed.lrs == [(step + 1, by_epoch[step // 2]) for step in range(2 * EPOCHS)]
    assert undisturbed.ended == (EPOCHS, True, None)
    plateau = [line for line in undisturbed.log if line.startswith("plateau")]
    assert ["bad epoch 1, patience 1" in line for line in plateau] == [True, False, True, False, False, False]
    assert "bad epoch 2, patience 1: lr 0.01 -> 0.005 (drop 1 of 2)" in plateau[1]
    assert "bad epoch 2, patience 1: lr 0.005 -> 0.0025 (drop 2 of 2)" in plateau[3]
    assert undisturbed.log[-1].endswith("bad epoch 6 of 6; the run ends")


def test_a_restart_inside_the_patience_changes_no_decision(patience: list[dict[str, list[Decisions]]]) -> None:
    (undisturbed,) = patience[0]["undisturbed"]
    parts = patience[0]["stopped twice"]
    assert [part.ended[0] for part in parts] == [2, 5, EPOCHS]
    assert [bool(part.ended[2]) for part in parts] == [True, True, False]
    assert [lr for part in parts for lr in part.lrs] == undisturbed.lrs
    assert [line for part in parts for line in part.log] == undisturbed.log


def test_all_ranks_make_the_same_decisions(patience: list[dict[str, list[Decisions]]]) -> None:
    def without_reason(ranks: dict[str, list[Decisions]]) -> dict[str, list[tuple[Any, ...]]]:
        return {name: [(part.lrs, part.log, part.ended[:2]) for part in parts] for name, parts in ranks.items()}

    assert without_reason(patience[1]) == without_reason(patience[0])


@in_group
def run_to_the_end_of_an_epoch(folder: Path) -> dict[str, tuple[int, int]]:
    """Stop, and in another run save, on the last step of the first epoch."""

    def config(name: str, **settings: Any) -> TrainConfig:
        return small_config(folder / name, data={"train_samples": 50, "validation_fraction": 0.2}, **settings)

    undisturbed = train(config("undisturbed"))
    first = train(config("stopped"), stop=StopAfter(1))
    second = train(config("stopped"))
    saving = {"every_minutes": 0.0, "every_steps": 2}
    train(config("saved", epochs=1, checkpoint=saving))
    saved = train(config("saved", checkpoint=saving))
    states = {"undisturbed": undisturbed, "stopped": first, "resumed": second, "saved": saved}
    return {name: (state.epoch, state.step) for name, state in states.items()}


@pytest.fixture(scope="module")
def end_of_epoch(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, tuple[int, int]]]]:
    folder = tmp_path_factory.mktemp("end")
    return folder, run_ranks(run_to_the_end_of_an_epoch, 2, folder)


@pytest.mark.parametrize("name", ["stopped", "saved"])
def test_a_stop_or_save_on_an_epochs_last_step_is_harmless(
    end_of_epoch: tuple[Path, list[dict[str, tuple[int, int]]]], name: str
) -> None:
    folder, ranks = end_of_epoch
    expected, found = RunFolder(folder / "undisturbed"), RunFolder(folder / name)
    assert ranks[0]["stopped"][1] == 2
    assert ranks[0]["resumed"] == ranks[0]["saved"] == ranks[0]["undisturbed"] == (2, 4)
    assert lines(found, "train") == lines(expected, "train")
    assert lines(found, "epoch") == lines(expected, "epoch")
    assert state_of(found) == state_of(expected)
    assert digest(newest_checkpoint(found.path) / "tensors.safetensors") == digest(
        newest_checkpoint(expected.path) / "tensors.safetensors"
    )


def summed_by(run_dir: Path, bucket_mib: int) -> str:
    engine = {"name": "ddp", "bucket_mib": bucket_mib}
    train(small_config(run_dir, epochs=1, exact=FAST, engine=engine, data={"train_samples": 24}))
    return str((RunFolder(run_dir).newest_state() or {})["bits"]["sum of gradients"])


def summed_by_buckets(run_dir: Path) -> str:
    vars(shared_sum)["open_shared_memory"] = lambda size, device: None
    return summed_by(run_dir, 2)


def test_what_sums_gradients_is_recorded_in_fast_mode(tmp_path: Path) -> None:
    """It decides the order of the sum. A resume with another one warns."""
    assert run_ranks(summed_by, 2, tmp_path / "shared", 2) == ["shared memory"] * 2
    assert run_ranks(summed_by_buckets, 2, tmp_path / "ddp") == ["DistributedDataParallel, in buckets of 2 MiB"] * 2
