"""Writes a classifier in each export format, and loads it again from the file alone."""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from distributed.config.models import BuiltInModel, model_from
from distributed.inference.saved_run import Normalization
from distributed.inference.trained_run import Classifier, TrainedRun
from distributed.models.build import build_model, load_weights

ExportedModel = Callable[[Tensor], Tensor]
"""Maps images [n, channels, h, w] in [0, 1] to logits [n, classes], for any n."""


@dataclass(frozen=True)
class Format:
    """An export format.

    Attributes:
        file: name of the exported file.
        contents: returns the bytes of that file and of any file beside it, by name. Bytes, because torch's own writer
            aborts the process on a full disk and would leave an existing file half overwritten.
        load: loads the file and returns a function that runs the model.
    """

    file: str
    contents: Callable[[TrainedRun, dict[str, Any]], dict[str, bytes]]
    load: Callable[[Path], ExportedModel]


def _as_safetensors(trained: TrainedRun, metadata: dict[str, Any]) -> dict[str, bytes]:
    """Write the weights under the network's own names, and a JSON file with everything needed to use them."""
    trained.network.train()  # some networks merge weights in `eval`
    try:
        # Copies, because the format refuses tensors that share memory, e.g. tied weights.
        state = trained.network.state_dict()
        tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
    finally:
        trained.network.eval()
    header = {"format": "pt", "architecture": str(metadata["architecture"]["name"])}
    return {
        "model.safetensors": save(tensors, metadata=header),
        "model.json": (json.dumps(metadata, indent=1) + "\n").encode(),
    }


def _load_safetensors(file: Path) -> ExportedModel:
    metadata = json.loads(file.with_suffix(".json").read_text())
    model = model_from(metadata["architecture"])
    network = build_model(model, num_classes=len(metadata["classes"]), seed=0)
    load_weights(network, load_file(file))
    normalization = Normalization(**metadata["normalization"])
    return Classifier(network, normalization, repeats_channel=isinstance(model, BuiltInModel)).requires_grad_(False)


def _as_torch_export(trained: TrainedRun, metadata: dict[str, Any]) -> dict[str, bytes]:
    with torch.no_grad():
        program = torch.export.export(trained.classifier, (_example(trained),), dynamic_shapes=_any_batch())
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={"model.json": json.dumps(metadata)})
    return {"model.pt2": file.getvalue()}


def _load_torch_export(file: Path) -> ExportedModel:
    module = torch.export.load(file).module()

    def run(images: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = module(images)
            return logits

    return run


def _as_onnx(trained: TrainedRun, metadata: dict[str, Any]) -> dict[str, bytes]:
    program = torch.onnx.export(
        trained.classifier, (_example(trained),), dynamo=True, verbose=False, external_data=False,
        input_names=["images"], output_names=["logits"], dynamic_shapes=_any_batch(),
    )  # fmt: skip
    assert program is not None
    program.model.metadata_props.update({name: json.dumps(value) for name, value in metadata.items()})
    return {"model.onnx": program.model_proto.SerializeToString()}


def _load_onnx(file: Path) -> ExportedModel:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _example(trained: TrainedRun) -> Tensor:
    # A batch of two, since torch.export would specialize on a batch of one.
    return torch.zeros(2, *trained.input_shape)


def _any_batch() -> dict[str, Any]:
    return {"images": {0: torch.export.Dim("n")}}


FORMATS = {
    "safetensors": Format("model.safetensors", _as_safetensors, _load_safetensors),
    "onnx": Format("model.onnx", _as_onnx, _load_onnx),
    "torch.export": Format("model.pt2", _as_torch_export, _load_torch_export),
}
