"""Objects given to `train`: how the config names them, and a line for each argument of a wrong type."""

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.own_networks import write_networks
from kit.small_runs import Recorder, StopAfter, small_config
from kit.user_modules import importable
from torch import nn

from distributed.config import TrainConfig, load_config
from distributed.config.given import check_arguments, import_path_of, with_given
from distributed.errors import InputError
from distributed.host.importable import check_module


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Any]:
    write_networks(tmp_path)
    with importable(tmp_path):
        yield import_module("own_networks")


def in_script(code: str, name: str) -> Any:
    space: dict[str, Any] = {"__name__": "__main__"}
    exec(code, space)
    return space[name]


def test_what_can_be_imported_is_named_by_its_path(own: Any) -> None:
    assert import_path_of(own.make) == "own_networks:make"
    assert import_path_of(own.Net) == "own_networks:Net"
    assert import_path_of(StopAfter.requested) == "kit.small_runs:StopAfter.requested"


def test_what_cannot_be_imported_is_named_after_the_script(own: Any) -> None:
    def inner(num_classes: int) -> nn.Module:
        return nn.Linear(1, num_classes)

    lazily: Callable[[int], nn.Module] = lambda num_classes: nn.Linear(1, num_classes)  # noqa: E731
    assert import_path_of(inner) == "__main__:inner"
    assert import_path_of(lazily) == "__main__:function"
    assert import_path_of(own.Net(10)) == "__main__:Net"
    assert import_path_of(functools.partial(own.make, width=4)) == "__main__:make"
    assert import_path_of(in_script("class Net: pass", "Net")) == "__main__:Net"
    assert import_path_of(OrderedDict(a=1).get) == "__main__:get"


def test_a_name_taken_by_another_object_is_no_path(own: Any) -> None:
    first = own.make
    own.make = own.draws
    assert import_path_of(first) == "__main__:make"


def test_a_cell_without_a_module_has_a_name() -> None:
    space: dict[str, Any] = {}
    exec("def make(num_classes): pass", space)  # its __module__ is builtins
    assert import_path_of(space["make"]) == "__main__:make"


def test_the_section_is_replaced(own: Any, tmp_path: Path) -> None:
    config = small_config(tmp_path)
    given = with_given(config, model=own.make)
    assert (given.model.name, given.model.model_dump()["options"]) == ("own_networks:make", {})
    assert given.model_copy(update={"model": config.model}) == config
    section = {"name": "own_networks:make", "options": {"width": 4}, "input_side": 48}
    with_options = small_config(tmp_path, model=section)
    assert with_given(with_options, model=own.make) == with_options
    assert with_given(with_options, model=own.Net).model.model_dump()["options"] == {}
    assert with_given(config) is config


def test_settings_that_the_object_needs(tmp_path: Path) -> None:
    config = load_config(data={"name": "image_folder", "root": str(tmp_path)})
    with pytest.raises(InputError, match=r"needs (data\.side|model\.input_side)"):
        with_given(config, model=nn.Linear)


WRONG_MODELS = {
    "text": ("net:make", "model = net:make: should be a function or class called as model(num_classes=N)"),
    "a number": (3, "model is of type int: should be a function or class"),
    "a state": ({"weight": torch.zeros(1)}, "model is of type dict: "),
    "a section": (TrainConfig().model, "model is of type Model: "),
}


@pytest.mark.parametrize("case", WRONG_MODELS)
def test_a_wrong_model_is_one_line(case: str, tmp_path: Path) -> None:
    model, message = WRONG_MODELS[case]
    with pytest.raises(InputError) as caught:
        with_given(small_config(tmp_path), model=model)
    [line] = caught.value.lines
    assert line.startswith("train(): ")
    assert message in line


class NoClose:
    log_step = log_epoch = print


WRONG_ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "a name": ({"config": "cifar10"}, "config is of type str: should be a TrainConfig, e.g. of load_config"),
    "a dict": ({"config": {"epochs": 3}}, "config is of type dict: "),
    "a stop without a method": ({"stop": True}, "stop is of type bool: should be an object with a method requested()"),
    "a class as stop": ({"stop": StopAfter}, "stop is of type type: "),
    "one sink": ({"sinks": Recorder()}, "sinks is of type Recorder: should be a list of sinks"),
    "none": ({"sinks": None}, "sinks is of type NoneType: should be a list of sinks"),
    "a class as sink": ({"sinks": [Recorder]}, "sinks has an object of type type: "),
    "a sink without close": ({"sinks": [NoClose()]}, "it lacks close"),
    "a function as sink": ({"sinks": [print]}, "it lacks log_step and log_epoch and close"),
}


@pytest.mark.parametrize("case", WRONG_ARGUMENTS)
def test_a_wrong_argument_is_one_line(case: str, tmp_path: Path) -> None:
    wrong, message = WRONG_ARGUMENTS[case]
    arguments: dict[str, Any] = {"config": small_config(tmp_path), "stop": None, "sinks": []} | wrong
    with pytest.raises(InputError) as caught:
        check_arguments(arguments.pop("config"), **arguments)
    [line] = caught.value.lines
    assert line.startswith("train(): ")
    assert message in line


def test_good_arguments_are_accepted(tmp_path: Path) -> None:
    check_arguments(small_config(tmp_path), stop=StopAfter(1), sinks=[Recorder()])


def test_the_object_of_a_script_is_not_imported() -> None:
    with pytest.raises(InputError) as caught:
        check_module("__main__:Net", "model.name")
    assert caught.value.lines == (
        "model.name = __main__:Net: this run's network exists only in the script or notebook that trained it: in Python, "
        "distributed.load(RUN, model=...) takes it; commands find one that is in a module of its own",
    )


def test_a_section_for_a_launcher_is_refused(tmp_path: Path) -> None:
    config = load_config(scaling={"num_workers": 2}, run_dir=tmp_path)
    with pytest.raises(
        InputError, match=r"train\(\): scaling.num_workers = 2: scaling is for python -m launch.ray_train"
    ):
        check_arguments(config, stop=None, sinks=[])
