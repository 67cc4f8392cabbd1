"""Rules that every file of launch/ and slurm/ keeps."""

import ast
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "launch").rglob("*.py"))
RAY = {"capacity", "cluster", "compat", "connection", "driver", "growth", "node_check", "sweep", "worker"}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(statements: list[ast.stmt]) -> Iterator[str]:
    for node in statements:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_and_functions_are_documented_and_short(path: Path):
    text = path.read_text()
    tree = ast.parse(text)
    assert len(text.splitlines()) <= 250
    assert ast.get_docstring(tree)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert [node.name for node in functions if node.end_lineno - node.lineno >= 60] == []


@pytest.mark.parametrize("path", [path for path in FILES if path.stem != "environment"], ids=name_of)
def test_only_environment_modules_read_the_environment(path: Path):
    text = path.read_text()
    assert not [call for call in ("os.environ[", "environ.get", "getenv") if call in text]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_the_network_test_and_ray_import_torch(path: Path):
    packages = {module.partition(".")[0] for module in imported(ast.parse(path.read_text()).body)}
    assert "torch" not in packages or path.stem == "network"
    assert "ray" not in packages or (path.parent.name == "on_ray" and path.stem in RAY)


@pytest.mark.parametrize("path", [path for path in FILES if path.stem != "compat"], ids=name_of)
def test_only_compat_uses_private_parts_of_ray(path: Path):
    assert "ray._private" not in path.read_text()
    assert "._internal_kv" not in path.read_text()


def test_no_package_outside_the_launcher_imports_ray():
    trees = {file: list(ast.walk(ast.parse(file.read_text()))) for file in (ROOT / "distributed").rglob("*.py")}
    assert [file for file, tree in trees.items() if "ray" in {name.partition(".")[0] for name in imported(tree)}] == []


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    scripts = [*map(str, (ROOT / "slurm").glob("*.sh")), str(ROOT / ".ci/run")]
    done = subprocess.run(["shellcheck", "-x", *scripts], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout == ""


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_batch_scripts_differ_only_in_name_and_config(name: str):
    def commands(script: str) -> list[str]:
        lines = (ROOT / f"slurm/{script}.sh").read_text().splitlines()
        return [line for line in lines if line.startswith("#SBATCH") or not line.startswith("#")]

    own = [re.sub(r'"\$project/configs/\S+" ', "", line).replace(name, "train") for line in commands(name)]
    assert own == commands("train")
