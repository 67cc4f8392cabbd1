"""Networks by import path: their weights, the generators, and a line for everything that a factory can do wrong."""

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from kit.own_networks import NETWORKS, write_networks
from kit.small_runs import FAST, StopAfter, small_config
from kit.user_modules import importable
from kit.view_network import Scaled
from torch import Tensor, nn

from distributed.config.models import ImportedModel
from distributed.errors import InputError
from distributed.models.build import build_model, load_weights
from distributed.models.keyed_dropout import KeyedDropout
from distributed.models.network_output import check_gradients, check_output
from distributed.recipe import train

IMAGES, KEYS = torch.zeros(2, 3, 32, 32), torch.zeros(2, 2, dtype=torch.int64)


@pytest.fixture(autouse=True)
def module(tmp_path: Path) -> Iterator[None]:
    write_networks(tmp_path)
    (tmp_path / "imports_nothing.py").write_text("\nimport nothing_of_this_name\n")
    (tmp_path / "imports_later.py").write_text(
        "def __getattr__(name):\n    if name == 'make':\n        import nothing_of_this_name\n    raise AttributeError(name)\n"
    )
    (tmp_path / "bad_syntax.py").write_text("x = 1\ndef f(:\n")
    with importable(tmp_path):
        yield


def build(factory: str, *, seed: int = 0, **options: object) -> nn.Module:
    name = factory if ":" in factory else f"own_networks:{factory}"
    return build_model(ImportedModel(name=name, options=options), num_classes=10, seed=seed)


def checked(factory: str, images: Tensor = IMAGES, **options: object) -> nn.Module:
    model = build(factory, **options)
    name = factory if ":" in factory else f"own_networks:{factory}"
    check_output(model, images, KEYS, name=name, num_classes=10, seed=0)
    check_gradients(model, images, KEYS, name=name, seed=0)
    return model


def same(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def generators() -> tuple[object, ...]:
    return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())


def test_the_seed_alone_decides_the_weights() -> None:
    torch.manual_seed(1)
    first = build("draws")
    torch.manual_seed(2)
    random.seed(2)
    np.random.seed(2)
    assert same(first, build("draws"))
    for other in (build("draws", seed=1), build("draws", seed=2**63 - 1)):
        assert not any(torch.equal(a, b) for a, b in zip(first.drawn, other.drawn, strict=True))
        assert not torch.equal(first.conv.weight, other.conv.weight)


class Orthogonal(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(512, 1024)))


@pytest.mark.usefixtures("restore_threads")
def test_the_number_of_threads_does_not_change_the_weights() -> None:
    config, found = ImportedModel(name="own:Orthogonal"), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(build_model(config, num_classes=10, seed=0, given=Orthogonal).weight)
        assert torch.get_num_threads() == threads
    assert torch.equal(*found)


def test_a_weight_in_numpys_memory_gets_torchs() -> None:
    """NumPy's memory cannot be freed, as sharded weights are."""
    module = nn.Linear(3, 10)
    module.weight = nn.Parameter(torch.from_numpy(np.ones((10, 3), np.float32)))
    model = build_model(ImportedModel(name="own:Net"), num_classes=10, seed=0, given=module)
    assert model.weight.untyped_storage().resizable()
    assert torch.equal(model.weight, torch.ones(10, 3))


def test_the_weights_of_the_module_itself_are_kept() -> None:
    model = build("make", width=4)
    assert model.conv.weight.shape == (4, 3, 3, 3)
    assert torch.equal(model.conv.bias, torch.full((4,), 0.125))


def test_generators_and_the_default_type_are_restored() -> None:
    before = generators()
    model = checked("draws")
    assert generators() == before
    assert torch.get_default_dtype() == torch.float32
    assert model.training
    with pytest.raises(InputError):
        build("fails")
    assert generators() == before


def test_the_check_leaves_the_network_as_it_was() -> None:
    model = build("make")
    check_output(model, torch.rand(IMAGES.shape), KEYS, name="own_networks:make", num_classes=10, seed=0)
    assert same(model, build("make"))
    assert model.training


def test_dropout_is_keyed() -> None:
    assert isinstance(build("make").drop, KeyedDropout)


def test_options_are_not_shared_with_the_factory(tmp_path: Path) -> None:
    (tmp_path / "own_networks.py").write_text(
        "import torch\ndef make(num_classes, sizes):\n    sizes.append(num_classes)\n    return torch.nn.Linear(*sizes)\n"
    )
    config = ImportedModel(name="own_networks:make", options={"sizes": [3]})
    for _ in range(2):
        assert build_model(config, num_classes=10, seed=0).weight.shape == (10, 3)
    assert config.options == {"sizes": [3]}


def line_of(text: str) -> int:
    return next(number for number, line in enumerate(NETWORKS.splitlines(), start=1) if text in line)


WRONG: dict[str, tuple[str, dict[str, object], str]] = {
    "no such module": ("own_network:make", {}, "there is no module own_network; did you mean own_networks?"),
    "no such attribute": ("mak", {}, "own_networks has no mak; did you mean make?"),
    "no attribute like it": ("xyzzy", {}, "own_networks has no xyzzy; name a function or class"),
    "no such method": ("Net.xyzzy", {}, "own_networks.Net has no xyzzy; "),
    "a module that fails": (
        "imports_nothing:make", {},
        "imports_nothing cannot be imported: ModuleNotFoundError: No module named 'nothing_of_this_name' (",
    ),
    "a module that imports its parts later and fails": (
        "imports_later:make", {},
        "imports_later.make cannot be imported: ModuleNotFoundError: No module named 'nothing_of_this_name' (",
    ),
    "the line that fails": ("imports_nothing:make", {}, "/imports_nothing.py:2)"),
    "bad syntax": ("bad_syntax:f", {}, "/bad_syntax.py:2)"),
    "not callable": ("number", {}, "own_networks.number is of type int; name a function or class"),
    "no num_classes": ("without_classes", {"width": 3}, "the factory does not accept num_classes"),
    "an unknown option": ("make", {"widht": 3}, "does not accept model.options.widht; did you mean width?"),
    "another unknown option": ("make", {"q": 3}, "does not accept model.options.q; it accepts width, drop"),
    "an unknown option, passed on": (
        "passes_on", {"depth": 3}, "does not accept model.options.depth: TypeError: Net.__init__() got an unexpected",
    ),
    "a missing option": ("needs_width", {}, "the factory needs the argument width; set model.options.width"),
    "an option of a wrong type": ("make", {"width": "a"}, "the factory failed: TypeError: "),
    "an error": ("fails", {}, "the factory failed: ValueError: no way ("),
    "the line of an error": ("fails", {}, f"/own_networks.py:{line_of('raise ValueError')})"),
    "an exit": ("exits", {}, "the factory failed: SystemExit: 3 ("),
    "nothing": ("nothing", {}, "the factory returned None; it should return a torch.nn.Module"),
    "no parameters": ("empty", {}, "no parameters that require gradients"),
    "frozen parameters": ("frozen", {}, "no parameters that require gradients"),
    "float64": ("double", {}, "head.weight is torch.float64; parameters should be torch.float32"),
    "complex": ("complex_weight", {}, "phase is torch.complex64; parameters should be torch.float32"),
    "lazy": ("lazy", {}, "1.weight has no size before the first forward pass"),
    "on another device": ("on_meta", {}, "head.weight is on meta; leave all tensors on the CPU"),
    "state besides tensors": ("Extra", {}, "_extra_state, which is not a tensor"),
    "other classes": (
        "other_classes", {},
        "in evaluation the network returns torch.float32 [2, 11] for images of shape [2, 3, 32, 32]; it should return logits",
    ),
    "two outputs in training": ("Pair", {}, "in training the network returns tuple"),
    "a forward that fails": ("NoForward", {}, "fails in evaluation on images of shape [2, 3, 32, 32]: RuntimeError: mat1"),
    "logits without a gradient": ("Detached", {}, "in training the logits depend on no parameter that requires gradients"),
    "dropout that is computed again": (
        "Recomputed", {}, "turn that off; in fast mode, set grad_checkpointing.enabled = true instead",
    ),
    "the line of a forward that fails": ("NoForward", {}, f"/own_networks.py:{line_of('return self.head(images)')})"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_factory_is_one_clear_line(name: str) -> None:
    factory, options, message = WRONG[name]
    with pytest.raises(InputError) as caught:
        checked(factory, **options)
    [line] = caught.value.lines
    assert line.startswith(f"model.name = {factory if ':' in factory else f'own_networks:{factory}'}: ")
    assert message in line
    assert len(line) < 500


def test_images_too_small_for_the_network() -> None:
    with pytest.raises(InputError, match=r"images of shape \[2, 3, 32, 32\]: RuntimeError: .*Output size is too small"):
        checked("torchvision.models:alexnet")


def test_weights_without_a_version_are_loaded() -> None:
    """The MNASNet of torchvision refuses a plain dict of its weights."""
    model, other = (build("torchvision.models:mnasnet0_5", seed=seed) for seed in (0, 1))
    load_weights(other, dict(model.state_dict()))
    assert same(model, other)
    with pytest.raises(RuntimeError, match="Missing key"):
        load_weights(other, {})


def test_parameters_get_contiguous_memory_of_their_own() -> None:
    original = Scaled(10)
    model = build_model(ImportedModel(name="kit.view_network:Scaled"), num_classes=10, seed=0, given=original)
    assert same(model, original)
    for parameter in model.parameters():
        assert parameter.is_contiguous()
        assert parameter.storage_offset() == 0
        assert parameter.untyped_storage().nbytes() == parameter.nbytes


@pytest.mark.usefixtures("restore_threads_and_log")
def test_a_network_with_an_expanded_buffer_resumes(tmp_path: Path) -> None:
    for exact in ({"shards": 4}, FAST):
        settings = {"model": {"name": "kit.view_network:Grid"}, "data": {"train_samples": 96}, "exact": exact}
        config = small_config(tmp_path / f"run-{exact['shards']}", epochs=1, **settings)
        assert train(config, stop=StopAfter(2)).stop_reason
        assert train(config).step == 4


def test_a_module_that_exists_is_not_trained_itself() -> None:
    existing = Scaled(10)
    built = [
        build_model(ImportedModel(name="__main__:f"), num_classes=10, seed=0, given=lambda num_classes: existing)
        for _ in "12"
    ]
    assert not {id(p) for model in (existing, built[0]) for p in model.parameters()} & {
        id(p) for p in built[1].parameters()
    }
    assert same(built[0], existing)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("kit.view_network:Copies", "state_dict() does not return the parameter "),
        ("kit.view_network:weight_norm", "use torch.nn.utils.parametrizations.weight_norm"),
    ],
)
def test_what_keeps_a_network_from_being_saved_is_named(factory: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        checked(factory)
    assert message in str(caught.value)
