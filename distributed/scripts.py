"""What the console scripts call: each runs its module as `python -m` does, the way its process ends included."""

import runpy


def train() -> None:
    """`distributed-train`."""
    _run("distributed.train")


def evaluate() -> None:
    """`distributed-evaluate`."""
    _run("distributed.evaluate")


def report() -> None:
    """`distributed-report`."""
    _run("distributed.report")


def _run(module: str) -> None:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
