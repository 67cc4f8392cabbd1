"""The section `model`: built-in names, import paths and the options of a factory."""

import json
from pathlib import Path

import pytest
from kit.configs import config_of, mistakes

from distributed.config import TrainConfig, as_toml, differences, load_config, read_saved
from distributed.config.models import ImportedModel, Model, model_from
from distributed.errors import InputError

NET = ("--model.name", "net:make")


def options_of(*arguments: str | Path) -> dict[str, object]:
    model = config_of(*NET, *arguments).model
    assert isinstance(model, ImportedModel)
    return model.options


def test_options_are_read_like_other_settings() -> None:
    assert options_of() == {}
    assert options_of("--model.options.weights", "none", "--model.options.width=16", "--model.options.rate", ".5") == {
        "weights": None, "width": 16, "rate": 0.5,
    }  # fmt: skip
    assert options_of("--model.options.act", "relu", "--model.options.text", '"16"', "--model.options.on", "true") == {
        "act": "relu", "text": "16", "on": True,
    }  # fmt: skip
    assert options_of("--model.options", '{width = 3, sizes = [1, 2], norm = "none"}') == {
        "width": 3, "sizes": [1, 2], "norm": None,
    }  # fmt: skip
    assert options_of("--model.options.norm.eps", "1e-3", "--model.options.norm.kind", "batch") == {
        "norm": {"eps": 1e-3, "kind": "batch"}
    }


def test_options_of_a_file_and_of_the_command_line_are_merged(tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text(
        '[model]\nname = "net:make"\n[model.options]\nname = "small"\nwidth = 3\nnorm = {eps = 0.1, affine = true}\n'
    )
    model = config_of(file, "--model.options.name", "large", "--model.options.norm.eps", "0.2").model
    assert model == ImportedModel(
        name="net:make", options={"name": "large", "width": 3, "norm": {"eps": 0.2, "affine": True}}
    )
    assert config_of(file, "--model.name", "net:other").model.options["width"] == 3
    assert config_of(file, "--model.name", "alexnet").model == Model(name="alexnet")
    (tmp_path / "built_in.toml").write_text('[model]\ninit = "he"\n')
    assert config_of(tmp_path / "built_in.toml", *NET).model == ImportedModel(name="net:make")


def test_options_survive_every_form_of_the_config(tmp_path: Path) -> None:
    options = {"weights": None, "on": True, "width": 3, "rate": 1.0, "act": "a\n\"b'", "sizes": [[1], ["none"]],
               "norm": {"eps": None, "any name": {}}, "blocks": [{"norm": None, "kinds": ["none"]}]}  # fmt: skip
    config = load_config(model={"name": "net:make", "options": options})
    assert config.model.options == options
    (tmp_path / "config.toml").write_text(as_toml(config))
    read = read_saved(tmp_path / "config.toml")
    as_json = TrainConfig.model_validate_json(config.model_dump_json())
    for copy in (read, as_json, TrainConfig.model_validate(config.model_dump())):
        assert copy == config
        assert json.dumps(copy.model.options) == json.dumps(options), "1.0 is still no integer"
    assert model_from(config.model.model_dump(mode="json")) == config.model
    assert model_from({"name": "alexnet", "init": "he"}) == Model(name="alexnet", init="he")


def test_a_float_option_may_be_large(tmp_path: Path) -> None:
    assert options_of("--model.options.mask", "-1e30") == {"mask": -1e30}
    (tmp_path / "config.toml").write_text(as_toml(load_config(model={"name": "net:make", "options": {"mask": -1e30}})))
    assert read_saved(tmp_path / "config.toml").model.options == {"mask": -1e30}


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ({"width": 1}, {"width": 2}, ("model.options.width", 1, 2)),
        ({"width": 1}, {"width": 1.0}, ("model.options.width", 1, 1.0)),
        ({"width": 1}, {"width": True}, ("model.options.width", 1, True)),
        ({}, {"width": None}, ("model.options.width", None, None)),
        ({"norm": {"eps": 1}}, {"norm": {}}, ("model.options.norm.eps", 1, None)),
        ({"norm": {}}, {}, ("model.options.norm", {}, None)),
        ({"sizes": [1]}, {"sizes": [2]}, ("model.options.sizes", [1], [2])),
    ],
)
def test_a_changed_option_is_a_difference(old: dict, new: dict, found: tuple) -> None:
    one, other = (load_config(model={"name": "net:make", "options": options}) for options in (old, new))
    assert found in [tuple(difference) for difference in differences(one, other)]
    assert differences(one, one) == []


def test_the_run_folder_is_named_after_the_factory() -> None:
    assert config_of("--model.name", "torchvision.models:resnet18").run_dir == Path("runs/resnet18-cifar10")


def test_images_are_decoded_or_resized_to_the_networks_input() -> None:
    folder = ("--data.name", "image_folder")
    cases = {
        NET: (None, None),
        (*NET, "--model.input_side", "64"): (None, 64),
        (*NET, *folder, "--model.input_side", "64"): (64, None),
        folder: (32, None),
        (*folder, "--model.name", "alexnet"): (224, None),
        ("--model.name", "alexnet"): (None, None),
        (*NET, "--data.name", "arrays", "--model.input_side", "64"): (None, 64),
    }
    for arguments, sides in cases.items():
        config = config_of(*arguments)
        assert (config.decoded_side, config.resized_side) == sides


def test_an_import_path_has_no_other_settings() -> None:
    with pytest.raises(InputError, match=r"model\.dropout = 0\.5: belongs to model\.name = alexnet"):
        load_config(model={"name": "net:make", "dropout": 0.5})


WRONG: dict[str, tuple[list[str], str]] = {
    "an unknown name": (["--model.name", "resnet"], "package.module:factory; e.g. torchvision.models:resnet18, or net:make"),
    "a misspelled name": (["--model.name", "improved_alexnt", "--model.init", "he"], "did you mean improved_alexnet?"),
    "dots only": (["--model.name", "torchvision.models.resnet18"], "did you mean torchvision.models:resnet18?"),
    "a file": (["--model.name", "./nets/own.py:make"], "did you mean nets.own:make?"),
    "a file in this folder": (["--model.name", "net.py:make"], "did you mean net:make?"),
    "a file alone": (["--model.name", "net.py"], "e.g. torchvision.models:resnet18"),
    "a call": (["--model.name", "net:make()"], "did you mean net:make?"),
    "two colons": (["--model.name", "a:b:c"], "should be one of alexnet | "),
    "no module": (["--model.name", ":make"], "should be one of alexnet | "),
    "a keyword": (["--model.name", "net:class"], "should be one of alexnet | "),
    "a long name": (["--model.name", "net:" + "x" * 300], "e.g. torchvision.models:resnet18"),
    "a number": (["--model.name", "3"], "should be one of alexnet | "),
    "a plain value": (["--model", "net:make"], "model = net:make: is a section; set its fields, e.g. --model.name VALUE"),
    "init": ([*NET, "--model.init", "he"], "model.init = he: belongs to model.name = alexnet | improved_alexnet | "),
    "dropout": ([*NET, "--model.dropout", "0.1"], "but here it is net:make; remove one of them"),
    "options of a built-in network": (
        ["--model.options.width", "3"],
        "model.options.width = 3: belongs to model.name = package.module:factory, but here it is improved_alexnet",
    ),
    "no options of a built-in network": (
        ["--model.name", "alexnet", "--model.options", "{}"], "model.options: belongs to model.name = package.module:factory",
    ),
    "options as a number": ([*NET, "--model.options", "3"], "is a table; set what is in it, e.g. --model.options.NAME VALUE"),
    "an option without a value": ([*NET, "--model.options.width"], "a value is missing; write --model.options.width VALUE"),
    "num_classes": ([*NET, "--model.options.num_classes", "3"], "model.options.num_classes: is the number of classes"),
    "no argument's name": ([*NET, "--model.options", "{a-b = 1}"], "model.options.a-b: should be the name of an argument"),
    "not finite": ([*NET, "--model.options.rate", "nan"], "model.options.rate = nan: should be text, true, false, none, a"),
    "a date": ([*NET, "--model.options.day", "1979-01-01"], "model.options.day = 1979-01-01: should be text, true, "),
    "a huge number": ([*NET, "--model.options.n", str(2**64)], "should be text, true, false, none, a finite number"),
    "a deep list": ([*NET, "--model.options.x", "[" * 6 + "]" * 6], "should not be nested more than 5 deep"),
    "a table and what is in it": (
        [*NET, "--model.options.x", "1", "--model.options", "{y = 2}"],
        "--model.options: given together with --model.options.x; remove one",
    ),
    "what is in it and a table": (
        [*NET, "--model.options", "{y = 2}", "--model.options.x", "1"],
        "--model.options.x: given together with --model.options; remove one",
    ),
    "a part of a plain setting": (["--optim.lr", "1", "--optim.lr.scaling", "x"], "given together with --optim.lr; remove"),
    "a part of an option": ([*NET, "--model.options.a", "1", "--model.options.a.b", "2"], "together with --model.options.a;"),
    "a setting and its section": (["--optim.lr", "1", "--optim", "{momentum = 0.5}"], "given together with --optim.lr; remove"),
    "a section and its setting": (["--optim", "{momentum = 0.5}", "--optim.lr", "1"], "given together with --optim; remove"),
    "a section in a section": (
        ["--data", "{name = 'generated10'}", "--data.augment", "{crop = 2}"], "--data.augment: given together with --data;",
    ),
    "no side": ([*NET, "--data.name", "image_folder"], "model.name = net:make needs model.input_side, since image"),
    "a side for a built-in network": (
        ["--data.name", "image_folder", "--model.input_side", "64"],
        "model.input_side = 64: belongs to model.name = package.module:factory, but here it is improved_alexnet",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_settings_are_one_clear_line(name: str) -> None:
    arguments, message = WRONG[name]
    [line] = mistakes(*arguments)
    assert message in line


def test_a_plain_setting_after_a_part_of_it_is_an_error() -> None:
    assert "--epochs: given together with --epochs.x; remove one" in mistakes("--epochs.x", "3", "--epochs", "2")[0]


@pytest.mark.parametrize(
    "options", [{"x": [None]}, {"x": {1: 2}}, {3: 4}, {"x": object()}, {"x": "\ud800"}, {"x": "\0"}]
)
def test_options_that_no_config_file_could_hold(options: dict) -> None:
    with pytest.raises(InputError, match=r"load_config\(\): model.options"):
        load_config(model={"name": "net:make", "options": options})
