"""The doctor's verdict on reports of nodes: each thing that can be wrong has its line, with the node."""

import copy
from typing import Any

import pytest

from launch.doctor.diagnosis import table, wrong
from launch.doctor.network import rounds


def reports(count: int = 3) -> list[dict[str, Any]]:
    return [
        {
            "node": f"n{index}", "index": index, "versions": {"torch": "2.15.0"}, "code": "abc", "data": "cifar10",
            "devices": {"gpus": 8, "gpu": "X", "gpu_memory_gib": 80.0, "cores": 16, "memory_gib": 100.0},
            "folder": {"path": "/run", "sees_token": True, "free_gib": 50.0, "writable": True},
            "network": {"met": list(range(count)), "sum_is_right": True, "clock_seconds": 0.001,
                        "gib_per_second": {str(other): 9.0 for other in range(count) if other != index}},
        }
        for index in range(count)
    ]  # fmt: skip


def judged(found: list[dict[str, Any]], **changed: Any) -> list[str]:
    return wrong(found, ["n0", "n1", "n2"], **{"token": True, "gpus": 8, "free_gib": 1.0} | changed)


def test_all_well():
    assert judged(reports()) == []
    assert len(table(reports()).splitlines()) == 4


@pytest.mark.parametrize(
    ("part", "key", "value", "said"),
    [
        ("versions", "torch", "2.11.0", "torch 2.11.0, and the others have 2.15.0"),
        ("devices", "gpus", 7, "7 GPUs, and 8 are expected"),
        ("devices", "gpu_memory_gib", 40.0, "GPUs of 40.0 GiB"),
        ("folder", "sees_token", False, "is not shared"),
        ("folder", "writable", False, "cannot be written"),
        ("folder", "free_gib", 0.5, "0.5 GiB free"),
        ("data", "error", "missing", "data: missing"),
        ("network", "error", "not reached", "network: not reached"),
        ("network", "met", [0, 1], "too late"),
        ("network", "sum_is_right", False, "wrong sum"),
        ("network", "clock_seconds", -7.0, "-7.0 s off"),
        ("network", "gib_per_second", {"0": 9.0, "1": -1.0}, "n1 and n2: wrong bytes"),
        ("network", "gib_per_second", {"0": 9.0, "1": 0.4}, "n1 and n2: 0.40 GiB/s"),
    ],
)
def test_one_bad_node_is_one_line(part: str, key: str, value: Any, said: str):
    found = copy.deepcopy(reports())
    if part == "data":
        found[2]["data"] = {key: value}
    else:
        found[2][part][key] = value
    lines = judged(found)
    assert len(lines) == 1
    assert "n2" in lines[0]
    assert said in lines[0]
    assert table(found)


def test_of_two_that_differ_the_first_node_is_the_measure():
    found = reports(2)
    found[1]["versions"]["torch"] = "2.11.0"
    assert wrong(found[::-1], ["n0", "n1"], token=True, gpus=8, free_gib=1.0)[0].startswith("n1: torch 2.11.0")


def test_a_node_that_is_silent_or_has_other_code_is_named():
    assert judged(reports()[:2])[0].startswith("n2: no answer")
    found = reports()
    found[1]["code"] = "def"
    assert "n1: its files of the project differ" in judged(found)[0]


@pytest.mark.parametrize("size", [2, 3, 8, 31])
def test_every_pair_is_measured_once_in_rounds_of_disjoint_pairs(size: int):
    seen = [(a, b) for pairs in rounds(size) for a, b in pairs.items()]
    assert sorted(seen) == [(a, b) for a in range(size) for b in range(size) if a != b]
    for pairs in rounds(size):
        assert all(pairs[b] == a for a, b in pairs.items())


def test_many_nodes_are_sampled():
    assert len(rounds(100)) == 8
