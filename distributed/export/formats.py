"""How a classifier is written in each format, and run again from the file alone."""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from distributed.config.sections import Model
from distributed.inference.classifier import Classifier, Trained
from distributed.inference.saved_run import Normalization
from distributed.models.build import build_model

Run = Callable[[Tensor], Tensor]
"""Images [n, 3, side, side] in [0, 1] to logits [n, classes], for any n."""


@dataclass(frozen=True)
class Format:
    """A file of an export: `contents` are the bytes of it and of those beside it, `load` gives what runs it.

    Bytes, not files: on a full disk torch's writer ends the process, and a file that was there would be half replaced.
    """

    file: str
    contents: Callable[[Trained, dict[str, Any]], dict[str, bytes]]
    load: Callable[[Path], Run]


def _as_safetensors(trained: Trained, facts: dict[str, Any]) -> dict[str, bytes]:
    """The weights by the network's own names, and beside them as JSON what is needed to use them."""
    tensors = {name: tensor.contiguous() for name, tensor in trained.classifier.network.state_dict().items()}
    metadata = {"format": "pt", "architecture": str(facts["architecture"]["name"])}
    return {
        "model.safetensors": save(tensors, metadata=metadata),
        "model.json": (json.dumps(facts, indent=1) + "\n").encode(),
    }


def _load_safetensors(file: Path) -> Run:
    facts = json.loads(file.with_suffix(".json").read_text())
    network = build_model(Model.model_validate(facts["architecture"]), num_classes=len(facts["classes"]), seed=0)
    network.load_state_dict(load_file(file))
    return Classifier(network, Normalization(**facts["normalization"])).requires_grad_(False)


def _as_torch_export(trained: Trained, facts: dict[str, Any]) -> dict[str, bytes]:
    with torch.no_grad():
        program = torch.export.export(trained.classifier, (_example(trained),), dynamic_shapes=_any_batch())
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={"model.json": json.dumps(facts)})
    return {"model.pt2": file.getvalue()}


def _load_torch_export(file: Path) -> Run:
    module = torch.export.load(file).module()

    def run(images: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = module(images)
            return logits

    return run


def _as_onnx(trained: Trained, facts: dict[str, Any]) -> dict[str, bytes]:
    program = torch.onnx.export(
        trained.classifier, (_example(trained),), dynamo=True, verbose=False, external_data=False,
        input_names=["images"], output_names=["logits"], dynamic_shapes=_any_batch(),
    )  # fmt: skip
    assert program is not None
    program.model.metadata_props.update({name: json.dumps(value) for name, value in facts.items()})
    return {"model.onnx": program.model_proto.SerializeToString()}


def _load_onnx(file: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _example(trained: Trained) -> Tensor:
    # Two: a batch of one would be taken for a size that never changes.
    return torch.zeros(2, 3, trained.side, trained.side)


def _any_batch() -> dict[str, Any]:
    return {"images": {0: torch.export.Dim("n")}}


FORMATS = {
    "safetensors": Format("model.safetensors", _as_safetensors, _load_safetensors),
    "onnx": Format("model.onnx", _as_onnx, _load_onnx),
    "torch.export": Format("model.pt2", _as_torch_export, _load_torch_export),
}
