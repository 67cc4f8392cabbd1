"""Export of networks that no built-in one resembles: weights that share memory."""

from pathlib import Path

import torch

from distributed.config import load_config
from distributed.export.formats import FORMATS
from distributed.inference.saved_run import Normalization
from distributed.inference.trained_run import Classifier, TrainedRun
from distributed.models.build import build_model


def test_tied_weights_are_written_under_each_name(tmp_path: Path) -> None:
    config = load_config(model={"name": "kit.tied_network:Tied", "options": {"width": 6}})
    normalization = Normalization([0.5, 0.4, 0.3], [0.2, 0.25, 0.3])
    classifier = Classifier(build_model(config.model, num_classes=2, seed=0), normalization).requires_grad_(False)
    trained = TrainedRun(config, tmp_path, classifier, ["a", "b"], normalization, (3, 32, 32))
    metadata = {
        "architecture": config.model.model_dump(mode="json"), "classes": ["a", "b"],
        "normalization": normalization._asdict(),
    }  # fmt: skip
    written = FORMATS["safetensors"].contents(trained, metadata)
    for name, content in written.items():
        (tmp_path / name).write_bytes(content)
    images = torch.rand(3, 3, 32, 32)
    loaded = FORMATS["safetensors"].load(tmp_path / "model.safetensors")
    assert torch.equal(loaded(images), classifier(images))
    assert b'"decode.weight"' in written["model.safetensors"][:2000]
