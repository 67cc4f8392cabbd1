"""Every engine takes the same step from equal weights in float32, whatever it shards. `pytest -s` prints the table."""

from typing import Any

import pytest
from kit.engines import ENGINES, built, config_with, copied, difference, steps
from kit.ranks import in_group, once, run_ranks

from distributed.comm.collectives import world_size

CASES: dict[str, dict[str, Any]] = {
    "SGD": {"optim": {"max_grad_norm": 0.5}},
    "SGD, 4 micro-batches": {"grad_accum_steps": 4},
    "AdamW, 4 micro-batches": {"optim": {"name": "adamw", "max_grad_norm": 0.5}, "grad_accum_steps": 4},
}
OTHERS = [name for name in ENGINES if name != "ddp"]
CASES_ON = {2: tuple(CASES), 3: ("AdamW, 4 micro-batches",), 4: ("SGD, 4 micro-batches",)}
"""World size -> cases; fewer for more processes, which share two cores."""
RATES = {"sgd": 0.01, "adamw": 1e-4}
NO_GRADIENT = [f"model.conv.{layer}.bias" for layer in (0, 4, 8, 11, 14)]
"""Biases before batch norm, which cancels them: their gradients are rounding error, which AdamW scales up to full steps."""
pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]


def settings(case: str) -> dict[str, Any]:
    """13 images per step, so shards are uneven; in the third step, four images in four micro-batches leave most ranks empty."""
    return {"global_batch_size": 13, "data": {"train_samples": 13 * 2 + 4}} | CASES[case]


@in_group
def compared() -> dict[tuple[str, str], dict[str, float]]:
    """Return the largest differences from DDP by (case, engine): of loss, norm, weights and optimizer after single steps from
    DDP's weights, and of losses and weights after three steps without synchronizing weights."""
    found = {}
    for case in CASES_ON[world_size()]:
        ddp_config = config_with("ddp", **settings(case))
        ddp, data = built(ddp_config)
        lr = RATES[ddp_config.optim.name]
        start, free = copied(ddp), steps(ddp, data, ddp_config, lr=lr, count=3)
        free_end = copied(ddp)
        for name in OTHERS:
            config = config_with(name, **settings(case))
            engine, _ = built(config)
            losses, _ = steps(engine, data, config, lr=lr, count=3)
            worst = {
                "free losses": max(abs(a - b) / b for a, b in zip(losses, free[0], strict=True)),
                "free weights": difference(copied(engine), free_end, "model", ignore=NO_GRADIENT),
            }
            before = start
            for step in range(3):
                ddp.load_state(before)
                engine.load_state(before)
                (loss,), (norm,) = steps(engine, data, config, lr=lr, first=step)
                (expected_loss,), (expected_norm,) = steps(ddp, data, ddp_config, lr=lr, first=step)
                after, expected = copied(engine), copied(ddp)
                differences = {
                    "loss": abs(loss - expected_loss) / expected_loss,
                    "norm": abs(norm - expected_norm) / expected_norm,
                    "weights": difference(after, expected, "model", ignore=NO_GRADIENT),
                    "optimizer": difference(after, expected, "optimizer"),
                }
                worst |= {key: max(worst.get(key, 0.0), value) for key, value in differences.items()}
                before = expected
            found[case, name] = worst
    return found


@once
def compared_on(size: int) -> dict[tuple[str, str], dict[str, float]]:
    first, *others = run_ranks(compared, size, timeout_seconds=400)
    assert all(other == first for other in others)
    print(f"\n{size} processes")
    for (case, name), worst in first.items():
        print(f"{case:22} {name:7}", *(f"{key} {value:.1e}" for key, value in worst.items()))
    return first  # type: ignore[no-any-return]


@pytest.mark.parametrize("engine", OTHERS)
@pytest.mark.parametrize(("world_size", "case"), [(size, case) for size, cases in CASES_ON.items() for case in cases])
def test_a_step_from_equal_weights_matches_ddp(case: str, engine: str, world_size: int) -> None:
    worst = compared_on(world_size)[case, engine]
    assert worst["weights"] < 1e-6
    assert worst["loss"] < 1e-6
    assert worst["norm"] < 1e-5
    if case.startswith("SGD"):
        assert worst["free losses"] < 1e-5
        assert worst["free weights"] < 1e-5


# Large models

LARGE = {"alexnet": "zero 3", "cifar_alexnet_bn": "zero 2"}
"""Each is trained with FSDP2 and one ZeRO stage: tens of millions of parameters."""


@in_group
def large_compared(model: str) -> dict[str, tuple[list[float], float]]:
    """Return, by engine, the losses of two steps of four images, and the difference of the weights from DDP's."""
    found, expected = {}, {}
    for name in ("ddp", "fsdp", LARGE[model]):
        settings = {"model": {"name": model}, "global_batch_size": 4}
        config = config_with(name, **settings, data={"train_samples": 10})
        engine, data = built(config)
        losses, _ = steps(engine, data, config, lr=0.01, count=2)
        expected = expected or copied(engine)
        found[name] = losses, difference(dict(engine.state()), expected, "model")
    return found


@pytest.mark.parametrize("model", LARGE)
def test_two_steps_of_large_models_match_ddp(model: str) -> None:
    found, other = run_ranks(large_compared, 2, model, timeout_seconds=300)
    assert found == other
    (expected, _), *others = found.values()
    for losses, weights in others:
        print(f"{model}: losses {losses}, weights within {weights:.1e}")
        assert losses == pytest.approx(expected, rel=1e-5)
        assert weights < 1e-5
