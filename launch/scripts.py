"""Entry points of the console scripts; each runs its module exactly as `python -m` does."""

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
