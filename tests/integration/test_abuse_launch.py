"""Bad inputs of the launchers and configs by name: one clear line each, exit code 2, before anything is started."""

from pathlib import Path

import pytest
from kit.abuse import assert_outcome, call, untouched

from distributed.config.named import names

JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1"}
RAY_JOB = {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}
SHORT = ("debug", "--device", "cpu", "--run_dir", "run")
RANDOM = ("--sweep.optim.lr", "log_uniform(1e-4, 1e-1)")


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_TASK_ID", "RAY_ADDRESS", *RAY_JOB):
        monkeypatch.delenv(name, raising=False)


NO_DATA = [
    ("train in a Slurm job", "train", (), JOB, "Slurm job 7 names neither a config nor a data set"),
    ("train in a Ray job", "train", (), RAY_JOB, "a Ray job names neither"),
    ("ray_train in a Ray job", "launch.ray_train", ("--run_dir", "/tmp/r"), RAY_JOB, "a Ray job names neither"),
    (
        "plan of a Slurm job",
        "launch.slurm.plan",
        ("127.0.0.1", "--epochs", 3),
        JOB,
        "--data.name generated10 for generated images",
    ),
    ("a model is not data", "train", ("--model.name", "alexnet"), JOB, "names neither a config nor a data set"),
]


@pytest.mark.parametrize(
    ("module", "arguments", "job", "message"), [case[1:] for case in NO_DATA], ids=[case[0] for case in NO_DATA]
)
def test_generated_images_never_replace_cifar_in_a_job(
    module: str, arguments: tuple[str, ...], job: dict[str, str], message: str, tmp_path: Path
):
    with untouched(tmp_path):
        assert_outcome(call(module, *arguments, **job), "CIFAR-10 is not there", message)


ENVIRONMENT = [
    ("no job", {"SLURM_JOB_ID": ""}, "SLURM_JOB_ID is not set"),
    ("a job that is not a number", {"SLURM_JOB_ID": "seven"}, "SLURM_JOB_ID = 'seven'"),
    ("a negative job", {"SLURM_JOB_ID": "-7"}, "should be a whole number of at least 0"),
    ("other digits", {"SLURM_JOB_ID": "٧"}, "SLURM_JOB_ID = '٧'"),
    ("endless digits", {"SLURM_JOB_ID": "9" * 5000}, "SLURM_JOB_ID"),
    ("a range of nodes", {"SLURM_JOB_NUM_NODES": "2-4"}, "SLURM_JOB_NUM_NODES = '2-4'"),
    ("no ranks", {"RANKS_PER_NODE": "0"}, "RANKS_PER_NODE = '0': should be a whole number of at least 1"),
    ("a task that is not a number", {"SLURM_ARRAY_TASK_ID": "first"}, "SLURM_ARRAY_TASK_ID = 'first'"),
    ("a limit that is not a number", {"MAX_REQUEUES": "many"}, "MAX_REQUEUES = 'many'"),
    ("several nodes on loopback", {"SLURM_JOB_NUM_NODES": "2"}, "resolves to 127.0.0.1, a loopback address"),
    ("more ranks than images", {"RANKS_PER_NODE": "64"}, "64 processes"),
    ("the job's folder is gone", {"JOB_FOLDER_MISSING": "/gone"}, "run_dir = run: relative to /gone"),
]


@pytest.mark.parametrize(
    ("changed", "message"), [case[1:] for case in ENVIRONMENT], ids=[case[0] for case in ENVIRONMENT]
)
def test_a_plan_for_an_unusable_job_is_refused(changed: dict[str, str], message: str, tmp_path: Path):
    with untouched(tmp_path):
        environment = {name: value for name, value in (JOB | changed).items() if value}
        found = call("launch.slurm.plan", "127.0.0.1", *SHORT, **environment)
        assert_outcome(found, message)
    assert found.out == "", "the batch script reads it"


ARGUMENTS = [
    ("plan without an address", "launch.slurm.plan", (), "the address is missing"),
    (
        "plan at an unknown host",
        "launch.slurm.plan",
        ("no-such-host.invalid", *SHORT),
        "rendezvous address = 'no-such-host.invalid'",
    ),
    ("plan at an address with a zero byte", "launch.slurm.plan", ("a\0b", *SHORT), "rendezvous address"),
    ("plan of an unknown config", "launch.slurm.plan", ("127.0.0.1", "debugg"), "did you mean debug?"),
    (
        "plan of a sweep without an array",
        "launch.slurm.plan",
        ("127.0.0.1", *SHORT, "--seeds", 3),
        "sweep: this job is not an array; submit it with --array=0-2",
    ),
    ("plan of a random sweep without trials", "launch.slurm.plan", ("127.0.0.1", *SHORT, *RANDOM), "add --trials 20"),
    ("slurm without a config", "launch.slurm", ("--epochs", 3), "the first argument names the config"),
    ("slurm with an unknown name", "launch.slurm", ("cifar11", "--dry-run"), "did you mean cifar10"),
    ("slurm with tasks at once", "launch.slurm", (*SHORT, "--at-once", 4), "--at-once 4: there is no sweep"),
    ("slurm with a folder", "launch.slurm", (".", "--dry-run"), "Is a directory"),
    (
        "slurm with an empty sweep",
        "launch.slurm",
        (*SHORT, "--sweep", "optim.lr="),
        "should be --sweep.SETTING VALUE,VALUE",
    ),
    ("slurm with an unknown sweep", "launch.slurm", (*SHORT, "--sweep.optim.lrr", "1"), "did you mean optim.lr?"),
    ("slurm with an unknown old sweep", "launch.slurm", (*SHORT, "--sweep", "optim.lrr=1"), "did you mean optim.lr?"),
    (
        "slurm with no seeds",
        "launch.slurm",
        (*SHORT, "--seeds", 0),
        "--seeds 0: should be a whole number of at least 1",
    ),
    ("slurm with too many ranks", "launch.slurm", (*SHORT, "--ranks-per-node", 9, "--dry-run"), "9 processes"),
    ("slurm with unchecked nodes", "launch.slurm", (*SHORT, "--sbatch=--nodes=4"), "not be checked; give --nodes N"),
    ("slurm with few nodes", "launch.slurm", (*SHORT, "--sbatch=-N4"), "not be checked; give --nodes N"),
    ("slurm with an unchecked array", "launch.slurm", (*SHORT, "--sbatch=--array=0-3"), "give a sweep, or --seeds N"),
    ("slurm without variables", "launch.slurm", (*SHORT, "--sbatch=--export=NONE"), "give --sbatch=--export=ALL,..."),
    ("slurm with a file as run folder", "launch.slurm", ("debug", "--run_dir", "empty/x", "--dry-run"), "empty"),
    ("doctor for zero seconds", "launch.doctor", (*SHORT, "--seconds", 0), "--seconds 0"),
    ("doctor forever", "launch.doctor", (*SHORT, "--seconds", "inf"), "--seconds inf"),
    ("doctor for NaN seconds", "launch.doctor", (*SHORT, "--seconds", "nan"), "--seconds nan"),
    ("doctor at an invalid port", "launch.doctor", (*SHORT, "--port", 65536), "--port 65536"),
    ("doctor at a negative port", "launch.doctor", (*SHORT, "--port", -1), "--port -1"),
    ("doctor of a missing config", "launch.doctor", ("none.toml",), "No such file"),
    ("doctor with an option of sbatch", "launch.doctor", (*SHORT, "--nodes", 2), "nodes = 2: unknown setting"),
    ("doctor of a file as run folder", "launch.doctor", ("debug", "--run_dir", "empty"), "run_dir = empty"),
    ("summary without a folder", "launch.summary", (), "give one folder"),
    ("summary of a folder without runs", "launch.summary", (".",), "no runs in it"),
    ("ray with a relative run folder", "launch.ray_train", SHORT, "run_dir = run: relative"),
    ("ray with an empty sweep", "launch.ray_train", ("debug", "--sweep.optim.lr"), "--sweep.optim.lr"),
    ("ray with a sweep of folders", "launch.ray_train", ("debug", "--sweep.run_dir", "/a,/b"), "cannot be swept"),
    (
        "ray with a sweep of workers",
        "launch.ray_train",
        ("debug", "--sweep", "scaling.num_workers=1,2"),
        "cannot be swept",
    ),
    (
        "ray with no trials",
        "launch.ray_train",
        ("debug", *RANDOM, "--trials", 0),
        "--trials 0: should be a whole number",
    ),
    ("ray with trials of a list", "launch.ray_train", ("debug", "--sweep.seed", "1,2", "--trials", 2), "has no effect"),
    (
        "slurm with an unknown distribution",
        "launch.slurm",
        (*SHORT, "--sweep.optim.lr", "log_unifrom(1, 2)", "--trials", 2),
        "there is no distribution log_unifrom; did you mean log_uniform?",
    ),
    (
        "slurm with swapped bounds",
        "launch.slurm",
        (*SHORT, "--sweep.optim.lr", "uniform(2, 1)", "--trials", 2),
        "--sweep.optim.lr uniform(2, 1): should have two finite bounds, the lower one first",
    ),
    (
        "slurm with more trials than values",
        "launch.slurm",
        (*SHORT, "--sweep.data.augment.crop", "integers(0, 4)", "--trials", 6),
        "only 5 different draws were found",
    ),
    (
        "slurm with one invalid trial",
        "launch.slurm",
        (*SHORT, "--sweep.optim.lr", "0.1,200"),
        "trial 1 (optim.lr=200): command line: optim.lr = 200: should be less than or equal to 100",
    ),
    (
        "ray with one trial of a conflict",
        "launch.ray_train",
        (*SHORT[:-1], "/tmp/none/run", "--sweep.optim.momentum", "0.9,0"),
        "trial 1 (optim.momentum=0): optim.nesterov = true needs momentum",
    ),
    (
        "slurm by a test metric",
        "launch.slurm",
        (*SHORT, "--seeds", 2, "--sweep.metric", "test.accuracy"),
        "--sweep.metric test.accuracy: should be one of validation.accuracy | validation.loss",
    ),
    ("slurm with a bad section", "launch.slurm", ("section.toml",), "section.toml:3: sweep.optim.lr = uniform(1)"),
    (
        "train with a sweep",
        "train",
        (*SHORT, "--sweep.optim.lr", "1,2"),
        "sweep (optim): sweeps are for python -m launch.slurm and launch.ray_train",
    ),
    (
        "slurm with a list in place of a number",
        "launch.slurm",
        (*SHORT, "--optim.lr", "0.1,0.05"),
        "optim.lr = 0.1,0.05: should be a valid number; to train once per value: launch.slurm ... --sweep.optim.lr 0.1,0.05",
    ),
    ("train with a distribution", "train", (*SHORT, "--optim.lr", "uniform(0.1, 0.2)"), "optim.lr = uniform(0.1, 0.2)"),
    ("train with a section sweep", "train", ("section.toml",), "or set sweep = none to train once"),
    (
        "summary by an unknown metric",
        "launch.summary",
        (".", "--by", "speed"),
        "--by speed: should be one of validation.accuracy | ",
    ),
    ("ray with a duplicate value", "launch.ray_train", ("debug", "--sweep.seed=1,1"), "--sweep.seed 1,1"),
    ("ray with no seeds", "launch.ray_train", ("debug", "--seeds", "none"), "--seeds none"),
]


@pytest.mark.parametrize(
    ("module", "arguments", "message"), [case[1:] for case in ARGUMENTS], ids=[case[0] for case in ARGUMENTS]
)
def test_wrong_launcher_arguments_are_one_line(
    module: str, arguments: tuple[object, ...], message: str, tmp_path: Path
):
    (tmp_path / "empty").write_text("")
    (tmp_path / "section.toml").write_text('extends = "debug"\n[sweep]\noptim.lr = "uniform(1)"\n')
    with untouched(tmp_path):
        assert_outcome(call(module, *arguments, **(JOB if module == "launch.slurm.plan" else {})), message)


ADDRESSES = [
    ("no port", "host"),
    ("a URL", "http://127.0.0.1:8265"),
    ("a port out of range", "127.0.0.1:99999"),
    ("no host", ":6379"),
    ("a port of letters", "127.0.0.1:ray"),
    ("a closed port", "127.0.0.1:1"),
]


@pytest.mark.parametrize("address", [case[1] for case in ADDRESSES], ids=[case[0] for case in ADDRESSES])
def test_an_address_without_ray_is_refused_at_once(address: str, tmp_path: Path):
    found = call("launch.ray_train", *SHORT[:-1], tmp_path / "run", RAY_ADDRESS=address)
    assert_outcome(found, f"RAY_ADDRESS = {address}")


def test_doctor_in_a_job_without_slurm_is_refused(tmp_path: Path):
    found = call("launch.doctor", *SHORT, **JOB, SLURM_JOB_NODELIST="n1", PATH=str(tmp_path))
    assert_outcome(found, "scontrol: No such file or directory; start this on a node of the job")


@pytest.mark.parametrize("count", ["2", "0"])
def test_doctor_in_a_job_without_its_nodes_is_refused(count: str):
    found = call("launch.doctor", *SHORT, SLURM_JOB_ID="7", SLURM_JOB_NUM_NODES=count, SLURM_JOB_NODELIST="")
    assert_outcome(found, "SLURM_JOB_NUM_NODES = ", count)


NAMED = [
    ("close to one", "cifar1O", "did you mean cifar10"),
    ("without its folder", "I-10", "did you mean seeds/I-10"),
    ("in capitals", "CIFAR10", "did you mean cifar10"),
    ("close to none", "imagenet", "choose one of cifar10, "),
    ("a path to nowhere", "nowhere/else", "no config of this name ships"),
    ("up and down", "../configs/cifar10", "no such file"),
    ("the file of a shipped one", "cifar10.toml", "did you mean the shipped config cifar10?"),
    ("the path of a shipped one", "configs/seeds/I-10.toml", "did you mean the shipped config seeds/I-10?"),
    ("another file", "mine.toml", "config file mine.toml: No such file"),
    ("a folder", "/", "config file /: Is a directory"),
    ("nothing", "", "config file"),
    ("a space", " ", "config file"),
    ("a line break", "cifar10\n", "config file"),
    ("endless name", "x" * 5000, "File name too long"),
    ("a file without suffix that is not TOML", "plain", "plain: not valid TOML"),
    ("a folder by the name of a config", "folder", "config file folder: Is a directory"),
]


@pytest.mark.parametrize(("given", "message"), [case[1:] for case in NAMED], ids=[case[0] for case in NAMED])
def test_an_unknown_config_name_lists_the_known_ones(given: str, message: str, tmp_path: Path):
    (tmp_path / "plain").write_text("no TOML\n")
    (tmp_path / "folder").mkdir()
    with untouched(tmp_path):
        assert_outcome(call("train", given), message)


@pytest.mark.parametrize("base", ["cifar11", "cifar10.toml", "folder"])
def test_an_unknown_base_config_is_named(base: str, tmp_path: Path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "mine.toml").write_text(f'extends = "{base}"\n')
    assert_outcome(call("train", "mine.toml"), base)


def test_a_shipped_config_is_found_from_any_folder(tmp_path: Path):
    (tmp_path / "cifar10").mkdir()
    for name in names():
        found = call("train", name, "--optim.lrr", 1)
        assert_outcome(found, "did you mean optim.lr?")
    (tmp_path / "mine.toml").write_text('extends = "seeds/I-10"\nepochs = 0\n')
    assert_outcome(call("train", "mine.toml"), "mine.toml:2: epochs = 0")


def test_a_local_file_comes_before_a_shipped_config(tmp_path: Path):
    (tmp_path / "debug").write_text("epochs = 0\n")
    assert_outcome(call("train", "debug"), "debug:1: epochs = 0")
    (tmp_path / "mine.toml").write_text('extends = "debug"\n')
    assert_outcome(call("train", "mine.toml"), "debug:1: epochs = 0")
