"""Entry points of the console scripts; each runs its module exactly as `python -m` does."""

import os
import runpy
import sys

import distributed  # noqa: F401  # before the current folder is on the path, where another `distributed` may be


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
    if not sys.flags.safe_path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does; model.name may be a module in this folder
    runpy.run_module(module, run_name="__main__", alter_sys=True)
