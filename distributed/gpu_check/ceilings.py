"""Step 1: measures the limits of this card and host, against which the speed of training can be judged."""

import json
from functools import partial

import torch

from distributed.gpu_check.checks import Checks
from distributed.gpu_check.graphs import captured
from distributed.gpu_check.processes import Processes
from distributed.gpu_check.timing import device_seconds, host_seconds


def run(checks: Checks) -> None:
    with Processes(checks.scratch, seconds=22) as processes:
        ranks = processes.start_ranks("gloo", 2, "distributed.gpu_check.gloo_latency")
        _copy(checks)
        _matrix_product(checks)
        _launches(checks)
        if checks.is_cuda:
            _graph_nodes(checks)
            _host_copies(checks)
        with checks.check("gloo all-reduce between two processes, microseconds") as figures:
            outputs = [rank.succeed() for rank in ranks]
            figures |= json.loads(outputs[0].splitlines()[-1])
            assert all(value > 0 for value in figures.values())


def _copy(checks: Checks) -> None:
    with checks.check("copy on the device") as figures:
        source = torch.randint(256, (2**20 if checks.tiny else 2**30,), dtype=torch.uint8, device=checks.device)
        target = torch.zeros_like(source)
        seconds = device_seconds(lambda: target.copy_(source), checks, repeats=10)
        figures["gb_per_second"] = 2 * source.nbytes / seconds / 1e9
        assert torch.equal(source, target)


def _matrix_product(checks: Checks) -> None:
    with checks.check("bfloat16 matrix product") as figures:
        side = 256 if checks.tiny else 8192
        a, b = (torch.randn(side, side, device=checks.device, dtype=torch.bfloat16) for _ in range(2))
        product = torch.empty_like(a)
        seconds = device_seconds(lambda: torch.mm(a, b, out=product), checks, repeats=10)
        figures["side"], figures["tflops"] = side, 2 * side**3 / seconds / 1e12
        expected = a[:8].double() @ b.double()
        error = float((product[:8].double() - expected).norm() / expected.norm())
        figures["relative_error"] = error
        assert error < 5e-3  # the result has 8 significant bits


def _launches(checks: Checks) -> None:
    with checks.check("small kernels, launched one by one") as figures:
        number = torch.zeros(1, device=checks.device)
        calls, repeats = (100, 3) if checks.tiny else (2000, 7)
        one = partial(number.add_, 1)
        figures["microseconds_per_launch"] = host_seconds(one, checks, repeats=repeats, calls=calls) * 1e6
        assert number.item() == calls * (1 + repeats)


def _graph_nodes(checks: Checks) -> None:
    with checks.check("small kernels in a CUDA graph") as figures:
        for nodes in (1, 500):
            number = torch.zeros(1, device=checks.device)

            def chain(number: torch.Tensor = number, nodes: int = nodes) -> None:
                for _ in range(nodes):
                    number.add_(1)

            graph = captured(chain, warm_up=1)
            number.zero_()
            seconds = device_seconds(graph.replay, checks, repeats=10, calls=20)
            figures[f"microseconds_per_replay_of_{nodes}"] = seconds * 1e6
            assert number.item() == nodes * 20 * 11
        replays = [figures[f"microseconds_per_replay_of_{nodes}"] for nodes in (1, 500)]
        figures["microseconds_per_node"] = (replays[1] - replays[0]) / 499


def _host_copies(checks: Checks) -> None:
    for memory in ("pinned", "pageable"):
        with checks.check(f"copies to and from {memory} host memory, GB/s") as figures:
            host = torch.randint(256, (2**20 if checks.tiny else 2**28,), dtype=torch.uint8)
            host = host.pin_memory() if memory == "pinned" else host
            on_device, back = torch.empty_like(host, device=checks.device), torch.zeros_like(host)
            back = back.pin_memory() if memory == "pinned" else back
            for name, target, source in (("to_device", on_device, host), ("from_device", back, on_device)):
                copy = partial(target.copy_, source, non_blocking=memory == "pinned")
                figures[name] = host.nbytes / host_seconds(copy, checks, repeats=5) / 1e9
            assert torch.equal(host, back)
