"""Export of networks that no built-in one resembles: weights that share memory, branches on values."""

import sys
from pathlib import Path

import pytest
import torch
from kit.small_runs import FAST, small_config

from distributed.config import load_config
from distributed.export.__main__ import main as export
from distributed.export.formats import FORMATS
from distributed.inference.saved_run import Normalization
from distributed.inference.trained_run import Classifier, TrainedRun
from distributed.models.build import build_model
from distributed.recipe import train


@pytest.mark.parametrize("network", ["Tied", "Merging"])
def test_tied_weights_are_written_under_each_name(tmp_path: Path, network: str) -> None:
    config = load_config(model={"name": f"kit.tied_network:{network}", "options": {"width": 6}})
    normalization = Normalization([0.5, 0.4, 0.3], [0.2, 0.25, 0.3])
    classifier = Classifier(build_model(config.model, num_classes=2, seed=0), normalization).requires_grad_(False)
    trained = TrainedRun(config, tmp_path, classifier, ["a", "b"], normalization, (32, 32), (3, 32, 32))
    metadata = {
        "architecture": config.model.model_dump(mode="json"), "classes": ["a", "b"],
        "normalization": normalization._asdict(),
    }  # fmt: skip
    written = FORMATS["safetensors"].contents(trained, metadata)
    for name, content in written.items():
        (tmp_path / name).write_bytes(content)
    images = torch.rand(3, 3, 32, 32)
    loaded = FORMATS["safetensors"].load(tmp_path / "model.safetensors")
    torch.testing.assert_close(loaded(images), classifier(images))
    assert b'"decode.weight"' in written["model.safetensors"][:2000]


@pytest.mark.parametrize("name", ["improved_alexnet", "cifar_alexnet"])
def test_networks_that_resize_are_exported_for_any_batch(name: str, tmp_path: Path) -> None:
    config = load_config(model={"name": name})
    normalization = Normalization([0.5, 0.4, 0.3], [0.2, 0.25, 0.3])
    classifier = Classifier(build_model(config.model, num_classes=2, seed=0), normalization).requires_grad_(False)
    trained = TrainedRun(config, tmp_path, classifier, ["a", "b"], normalization, (20, 24), (3, 20, 24))
    (tmp_path / "model.pt2").write_bytes(FORMATS["torch.export"].contents(trained, {})["model.pt2"])
    images = torch.rand(5, 3, 20, 24)
    torch.testing.assert_close(FORMATS["torch.export"].load(tmp_path / "model.pt2")(images), classifier(images))


@pytest.mark.usefixtures("restore_threads_and_log")
def test_a_network_that_cannot_be_traced_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config(
        tmp_path / "run", epochs=1, exact=FAST, model={"name": "kit.view_network:Branches"}, data={"train_samples": 24}
    )
    train(config)
    monkeypatch.setattr(sys, "argv", ["export", str(tmp_path / "run"), "--format", "torch.export", "safetensors"])
    assert export() == 2
    captured = capsys.readouterr()
    assert "safetensors   " in captured.out
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, captured.err
    assert lines[0].startswith(
        "error: --format torch.export: model.name = kit.view_network:Branches cannot be exported: "
    )
    assert lines[0].endswith("; the other formats are written")
