"""In exact mode all ranks start their collectives in the same order over all groups; otherwise NCCL may hang."""

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from kit.ranks import in_group, run_ranks
from kit.small_runs import small_config

from distributed import recipe
from distributed.comm import all_gather, collectives, delayed_max
from distributed.exact import bucket_reduce

GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
COLLECTIVES = (GATHER, "all_to_all_single", "all_reduce")


@in_group
def order_of(settings: dict[str, Any], run_dir: Path) -> list[tuple[str, str]]:
    """Return name and group of each collective of a run, in call order."""
    for module in (bucket_reduce, all_gather, delayed_max):  # as on GPUs or on several hosts
        vars(module)["open_shared_memory"] = lambda *_: None
    calls: list[tuple[str, str]] = []

    def recorded(name: str) -> Any:
        collective = getattr(dist, name)

        def call(*arguments: Any, **options: Any) -> Any:
            calls.append((name, "default" if options.get("group") is None else "another"))
            return collective(*arguments, **options)

        return call

    for name in COLLECTIVES:
        vars(dist)[name] = recorded(name)
    recipe.train(small_config(run_dir, epochs=1, exact={"shards": 4}, threads=2, **settings))
    assert collectives.world_size() > 1
    return calls


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_all_ranks_start_collectives_in_the_same_order(engine: str, tmp_path: Path) -> None:
    bucket = {"bucket_mib": 1} if engine == "ddp" else {}
    first, *others = run_ranks(
        order_of, 3, {"engine": {"name": engine, **bucket}}, tmp_path / "run", timeout_seconds=180
    )
    assert {name for name, _ in first} >= {GATHER, "all_to_all_single"}
    for other in others:
        assert other == first
    # Only the stop flags, which are host numbers, have another group (gloo); everything else uses one communicator.
    assert {name for name, group in first if group == "another"} <= {"all_to_all_single"}
