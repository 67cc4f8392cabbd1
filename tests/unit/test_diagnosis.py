"""The doctor's diagnosis: each thing that can be wrong on a node has its line, with the node's name."""

from typing import Any

import pytest

from launch.doctor.diagnosis import diagnose, notes, table
from launch.doctor.network import rounds
from launch.doctor.reports import Devices, Folder, Network, NodeReport

NODES = ["n0", "n1", "n2"]


def good_reports(count: int = 3) -> list[NodeReport]:
    return [
        NodeReport(
            node=f"n{index}", index=index, versions={"torch": "2.15.0"}, code="abc", data="cifar10",
            devices=Devices(gpus=8, gpu_memory_gib=80.0, cores=16, memory_gib=100.0),
            folder=Folder(path="/run", sees_token=True, free_gib=50.0, writable=True),
            network=Network(present=list(range(count)), clock_seconds=0.001,
                            gib_per_second={other: 9.0 for other in range(count) if other != index}),
        )
        for index in range(count)
    ]  # fmt: skip


def diagnosed(reports: list[NodeReport], **options: Any) -> list[str]:
    return diagnose(reports, NODES, **{"several": True, "gpus": 8, "free_gib": 1.0} | options)


def without(report: NodeReport, section: str, error: str) -> NodeReport:
    return report.model_copy(update={section: None, "errors": {section: error}})


def test_the_module_of_the_network_is_missing_or_differs():
    reports = [report.model_copy(update={"model": "abc"}) for report in good_reports()]
    assert diagnosed(reports) == []
    reports[1] = reports[1].model_copy(update={"model": "def"})
    reports[2] = without(reports[2], "model", "model.name = net:make: there is no module net")
    missing, differs = diagnosed(reports)
    assert missing == "n2: model.name = net:make: there is no module net"
    assert differs.startswith(
        "n1: the files of the modules that the config names differ from the others' (def, not abc)"
    )


def test_good_reports_have_no_failures():
    assert diagnosed(good_reports()) == []
    assert len(table(good_reports()).splitlines()) == 4


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("devices", {"gpus": 7}, "7 GPUs instead of 8"),
        ("devices", {"gpu_memory_gib": 40.0}, "GPUs of 40.0 GiB, but the others have 80.0 GiB"),
        ("folder", {"sees_token": False}, "is not shared"),
        ("folder", {"writable": False}, "is not writable"),
        ("folder", {"free_gib": 0.5}, "0.5 GiB free"),
        ("network", {"present": [0, 1]}, "too late"),
        ("network", {"sum_is_right": False}, "wrong sum"),
        ("network", {"gib_per_second": {0: 9.0, 1: -1.0}}, "n1 and n2: wrong bytes"),
    ],
)
def test_one_bad_node_is_one_line(section: str, change: dict[str, Any], message: str):
    reports = good_reports()
    changed = getattr(reports[2], section).model_copy(update=change)
    reports[2] = reports[2].model_copy(update={section: changed})
    [line] = diagnosed(reports)
    assert "n2" in line
    assert message in line
    assert table(reports)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clock_seconds": -7.0}, "n2: its clock is -7.0 s off"),
        ({"gib_per_second": {0: 9.0, 1: 0.4}}, "n1 and n2: 0.40 GiB/s"),
    ],
)
def test_a_wrong_clock_and_a_slow_link_end_no_job(change: dict[str, Any], message: str):
    reports = good_reports()
    assert notes(reports) == []
    changed = reports[2].network.model_copy(update=change)
    reports[2] = reports[2].model_copy(update={"network": changed})
    assert diagnosed(reports) == []
    [line] = notes(reports)
    assert line.startswith(message)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("versions", "n2: versions: missing"),
        ("code", "n2: its copy of the project: missing"),
        ("data", "n2: data: missing"),
        ("devices", "n2: devices: missing"),
        ("folder", "n2: run folder: missing"),
        ("network", "n2: network: missing"),
    ],
)
def test_a_section_that_failed_is_one_line(section: str, message: str):
    reports = good_reports()
    reports[2] = without(reports[2], section, "missing")
    [line] = diagnosed(reports)
    assert line.startswith(message)
    assert table(reports)


def test_without_a_majority_the_first_node_is_the_reference():
    reports = good_reports(2)
    reports[1] = reports[1].model_copy(update={"versions": {"torch": "2.11.0"}})
    lines = diagnose(reports[::-1], ["n0", "n1"], several=True, gpus=8, free_gib=1.0)
    assert lines[0].startswith("n1: torch 2.11.0, but the others have 2.15.0")


def test_a_silent_node_and_other_code_are_named():
    assert diagnosed(good_reports()[:2])[0].startswith("n2: no answer")
    reports = good_reports()
    reports[1] = reports[1].model_copy(update={"code": "def"})
    assert "n1: its copy of the project differs" in diagnosed(reports)[0]


@pytest.mark.parametrize("size", [2, 3, 8, 31])
def test_rounds_of_disjoint_pairs_cover_every_pair(size: int):
    seen = [(a, b) for pairs in rounds(size) for a, b in pairs.items()]
    assert sorted(seen) == [(a, b) for a in range(size) for b in range(size) if a != b]
    for pairs in rounds(size):
        assert all(pairs[b] == a for a, b in pairs.items())


def test_pairs_of_many_nodes_are_sampled():
    assert len(rounds(100)) == 8
