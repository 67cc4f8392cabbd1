"""Starting from a file of weights: what fits, what is said if it does not, and files that are something else."""

import copy
import pickle
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.tied_network import Tied
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor, nn

from distributed.checkpoint.snapshot import write_checkpoint
from distributed.checkpoint.warm_start import start_from
from distributed.config import TrainConfig, from_command_line
from distributed.config.models import ImportedModel
from distributed.errors import InputError
from distributed.run.resume_checks import check_init_from
from distributed.topology import Topology


class Net(nn.Module):
    """Has a batch norm, a persistent buffer and one that is not."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, classes)
        self.register_buffer("scale", torch.tensor(2.0))
        self.register_buffer("positions", torch.arange(6), persistent=False)


def config_of(folder: Path, path: Path, *more: str) -> TrainConfig:
    arguments = ["--data.name", "generated10", "--run_dir", str(folder / "run"), "--init_from", str(path), *more]
    return from_command_line(arguments).config


def trained_net(classes: int = 4) -> Net:
    net = Net(classes)
    for tensor in net.state_dict().values():
        tensor.fill_(3) if tensor.dtype == torch.int64 else tensor.normal_().abs_()
    return net


def load(folder: Path, tensors: dict[str, Tensor], *more: str, into: nn.Module | None = None) -> nn.Module:
    path = folder / "weights.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    config, net = config_of(folder, path, *more), into or Net()
    check_init_from(config)
    start_from(config, Topology(), net)
    return net


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_all_parameters_and_buffers_are_loaded(tmp_path):
    saved = trained_net()
    net = load(tmp_path, saved.state_dict())
    assert_equal(net, saved)
    assert net.norm.num_batches_tracked == 3


def test_half_precision_becomes_float32_and_float64_stays(tmp_path):
    saved = trained_net().half()
    net = load(tmp_path, saved.state_dict())
    assert net.fc.weight.dtype == torch.float32
    assert torch.equal(net.fc.weight, saved.fc.weight.float())
    wide = trained_net().double()
    wide.fc.weight.data += 1e-12
    assert_equal(load(tmp_path, wide.state_dict(), "--precision", "float64"), wide)


def test_a_buffer_that_is_not_saved_is_ignored(tmp_path):
    net = load(tmp_path, trained_net().state_dict() | {"positions": torch.zeros(6, dtype=torch.int64)})
    assert torch.equal(net.positions, torch.arange(6))


def test_files_without_the_counter_of_batches(tmp_path):
    tensors = trained_net().state_dict()
    del tensors["norm.num_batches_tracked"]
    assert load(tmp_path, tensors).norm.num_batches_tracked == 0


def test_tied_weights_need_one_name(tmp_path):
    saved = Tied(10)
    path = tmp_path / "tied.safetensors"
    save_model(saved, str(path))
    assert len(load_file(path)) < len(saved.state_dict())
    net = Tied(10)
    for parameter in net.parameters():
        parameter.data.zero_()
    start_from(config_of(tmp_path, path), Topology(), net)
    assert_equal(net, saved)


def test_a_last_layer_of_another_size_is_kept(tmp_path):
    own = Net(7)
    before = copy.deepcopy(own)
    saved = trained_net()
    load(tmp_path, saved.state_dict(), into=own)
    assert torch.equal(own.fc.weight, before.fc.weight)
    assert torch.equal(own.fc.bias, before.fc.bias)
    assert torch.equal(own.conv.weight, saved.conv.weight)


def without(*names: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {name: t for name, t in tensors.items() if name not in names}


def prefixed(prefix: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {prefix + name: t for name, t in tensors.items()}


MISFITS: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "missing": (without("fc.weight", "fc.bias"), "2 missing: fc.weight [4, 6], fc.bias [4]; name weights of the same"),
    "a buffer": (without("scale"), "1 missing: scale []"),
    "unexpected": (lambda t: t | {f"aux.{i}": torch.ones(2) for i in range(5)},
                   "5 unexpected: aux.0 [2], aux.1 [2], aux.2 [2] and 2 more; name"),
    "other columns": (lambda t: t | {"fc.weight": torch.ones(4, 5)}, "1 of another shape: fc.weight [4, 5], here [4, 6]"),
    "two layers": (lambda t: t | {"fc.bias": torch.ones(5), "norm.bias": torch.ones(5)}, "2 of another shape: norm.bias [5]"),
    "quantized": (lambda t: t | {"fc.weight": torch.ones(4, 6, dtype=torch.int8)}, "1 of another type: fc.weight torch.int8"),
    "module.": (prefixed("module."), "without the prefix module. the names fit; rename them: python -c"),
    "two prefixes": (prefixed("module.model."), "without the prefix module.model. the names fit"),
    "a prefix and another head": (lambda t: prefixed("model.")(t | {"fc.weight": torch.ones(9, 6), "fc.bias": torch.ones(9)}),
                                  "without the prefix model. the names fit"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit_is_listed(case, tmp_path):
    change, message = MISFITS[case]
    own = Net()
    before = copy.deepcopy(own)
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        load(tmp_path, change(trained_net().state_dict()), into=own)
    assert len(caught.value.lines) == 1
    assert "does not fit model.name = improved_alexnet" in str(caught.value)
    assert_equal(own, before)


def test_a_prefix_may_be_missing(tmp_path):
    own = nn.ModuleDict({"model": Net()})
    with pytest.raises(InputError, match=r"with the prefix model\. the names fit"):
        load(tmp_path, trained_net().state_dict(), into=own)


def run_command_in(message: str) -> None:
    """Run the Python command that a message ends with."""
    python, option, code = shlex.split(message[message.index("python -c") :])
    assert (python, option) == ("python", "-c")
    exec(code, {})


@pytest.mark.parametrize("prefix", ["module.", "model.net."])
def test_the_command_for_a_prefix_works(prefix, tmp_path):
    saved = trained_net()
    folder = tmp_path / 'bob\'s "$HOME"'
    folder.mkdir()
    with pytest.raises(InputError) as caught:
        load(folder, prefixed(prefix)(saved.state_dict()))
    run_command_in(str(caught.value))
    net = Net()
    start_from(config_of(folder, folder / "renamed-weights.safetensors"), Topology(), net)
    assert_equal(net, saved)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"fc\.bias has values that are not finite"):
        load(tmp_path, trained_net().state_dict() | {"fc.bias": torch.full((4,), torch.nan)})


def test_infinities_in_a_mask_are_accepted(tmp_path):
    mask = torch.tensor([0.0, -torch.inf])

    class Masked(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", mask.clone())

    saved = trained_net()
    net = load(tmp_path, saved.state_dict() | {"mask": mask}, into=Masked())
    assert torch.equal(net.state_dict()["mask"], mask)


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["net.pt", "net.bin", "net.safetensors", "net"])
@pytest.mark.parametrize("how", ["torch.save", "old torch.save", "pickle"])
def test_a_pickle_is_never_loaded(name, how, tmp_path):
    path, trap = tmp_path / name, Trap(tmp_path / "sprung")
    if how == "pickle":
        path.write_bytes(pickle.dumps(trap))
    else:
        torch.save({"fc.weight": trap}, path, _use_new_zipfile_serialization=how == "torch.save")
    with pytest.raises(InputError, match="a file that may be a pickle is never loaded; convert it once"):
        check_init_from(config_of(tmp_path, path))
    with pytest.raises(InputError, match="never loaded"):
        start_from(config_of(tmp_path, path), Topology(), Net())
    assert not trap.path.exists()


@pytest.mark.parametrize(
    ("saved", "now", "refused"),
    [
        ("torchvision.models:resnet18", "own:frozen", False),
        ("__main__:Net", "own:net", False),
        ("improved_alexnet", "own:net", True),
        (["improved_alexnet"], "own:net", True),
    ],
)
def test_imported_networks_may_have_other_names(saved, now, refused, tmp_path):
    checkpoint = tmp_path / "other/checkpoints/step-00000001-epoch-001"
    write_checkpoint_of(checkpoint, model=saved)
    config = config_of(tmp_path, tmp_path / "other")
    config = config.model_copy(update={"model": ImportedModel(name=now)})
    if refused:
        with pytest.raises(InputError, match=r"holds weights of .*, but model.name = own:net"):
            check_init_from(config)
    else:
        check_init_from(config)


def write_checkpoint_of(checkpoint, *, model):
    checkpoint.parent.mkdir(parents=True)
    write_checkpoint(checkpoint, {"model.x": torch.zeros(1)}, {"config": {"model": {"name": model}}})


def test_the_command_for_a_pickle_works(tmp_path):
    saved, path = trained_net(), tmp_path / "net's.pth"
    torch.save(saved.state_dict(), path)
    with pytest.raises(InputError) as caught:
        check_init_from(config_of(tmp_path, path))
    run_command_in(str(caught.value))
    net = Net()
    start_from(config_of(tmp_path, path.with_suffix(".safetensors")), Topology(), net)
    assert_equal(net, saved)


def test_a_checked_file_imports_no_torch(tmp_path):
    save_file(trained_net().state_dict(), tmp_path / "w.safetensors")
    code = (
        "import sys; from pathlib import Path; from distributed.run.weights_file import check_weights_file; "
        f"check_weights_file(Path({str(tmp_path / 'w.safetensors')!r})); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
