import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "distributed"
# A folder, or a file at the root, may import those in rows above its own. A folder's own files import each other, one way.
LAYERS = [
    "name_clash errors rng",
    "host files",
    "topology config documents",
    "process data.sources",
    "comm run optim",
    "data models figures",
    "exact",
    "engine",
    "training",
    "checkpoint",
    "network attempt",
    "build",
    "metrics inference",
    "recipe runs dry_run",
    "run_process",
    "train evaluate compare bench predict export experiments gpu_check",
    "report",
]
LEVEL = {name: level for level, row in enumerate(LAYERS) for name in row.split()}
LEVEL["__init__"] = len(LAYERS)  # the public interface, for type checkers
SLOW = {
    "torch",
    "torchvision",
    "deepspeed",
    "ray",
    "matplotlib",
    "tensorboard",
    "tqdm",
    "onnx",
    "onnxruntime",
    "fsspec",
    "wandb",
    "mlflow",
}
WITHOUT_TORCH = [
    "errors files topology config process host run",
    "train evaluate compare predict runs",
    "export.__main__ report.__main__ experiments.__main__ gpu_check.__main__",
    "checkpoint.object_store checkpoint.upload checkpoint.download inference.saved_run",
    "figures.style figures.confusion figures.curves data.sources.cifar data.sources.registry",
    "report.comparison report.run_sections metrics.installed",
]

FILES = sorted(ROOT.rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in FILES}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def folder_of(module: str) -> str:
    """The folder that a module is in, or the module itself at the root."""
    first, _, rest = module.partition(".")
    return "data.sources" if rest.split(".")[0] == "sources" else first


def imported(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield (dotted module, line) of every import, also inside functions; `from package import module` yields the module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            for alias in node.names:
                path = ROOT.parent.joinpath(*node.module.split("."), alias.name)
                is_module = path.is_dir() or path.with_suffix(".py").exists()
                yield (f"{node.module}.{alias.name}" if is_module else node.module), node.lineno


def imported_at_top(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yield the imports that run when the module is imported: not inside a function, not for type checkers only."""
    later = {
        found
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING")
        for found in imported(node)
    }
    return (found for found in imported(tree) if found not in later)


def own(tree: ast.AST) -> Iterator[tuple[str, int]]:
    for module, line in imported(tree):
        if module.startswith("distributed."):
            yield module.removeprefix("distributed."), line


def test_every_folder_has_a_row():
    assert {folder_of(name_of(path)) for path in FILES} == LEVEL.keys()
    assert len(" ".join(LAYERS).split()) + 1 == len(LEVEL)  # each in one row


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_run_one_way(path):
    folder = folder_of(name_of(path))
    wrong = [
        f"{path}:{line}: {folder} imports {other}"
        for other, line in own(TREES[path])
        if folder_of(other) != folder and LEVEL[folder_of(other)] >= LEVEL[folder]
    ]
    assert wrong == []


def test_modules_do_not_import_each_other_in_circles():
    graph = {name_of(path): {other for other, _ in own(TREES[path])} for path in FILES}

    def reached_from(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = list(graph[start])
        while waiting:
            name = waiting.pop()
            if name not in seen:
                seen.add(name)
                waiting += graph.get(name, set())
        return seen

    assert [name for name in graph if name in reached_from(name)] == []


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_the_topology_reads_the_environment(path):
    writes = {  # os.environ["A"] = ..., os.environ.setdefault("A", ...)
        id(node.value)
        for node in ast.walk(TREES[path])
        if (isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store))
        or (isinstance(node, ast.Attribute) and node.attr == "setdefault")
    }
    wrong = [
        f"{path}:{node.lineno}"
        for node in ast.walk(TREES[path])
        if (isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "environb"))
        and not (name_of(path) in ("training.determinism", "engine.deepspeed_compat") and id(node) in writes)
    ]
    wrong += [f"{path}:{n.lineno}" for n in ast.walk(TREES[path]) if isinstance(n, ast.ImportFrom) and n.module == "os"]
    # name_clash has to work when dask has overwritten other files.
    assert name_of(path) in ("topology", "name_clash") or wrong == []


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_slow_packages_are_imported_where_they_are_used(path):
    late = SLOW - {"torch", "torchvision"}
    top = imported_at_top(TREES[path])
    wrong = [f"{path}:{line}: {name}" for name, line in top if late & set(name.split("."))]
    assert wrong == []


@pytest.mark.parametrize("name", [name for row in WITHOUT_TORCH for name in row.split()])
def test_code_that_runs_before_torch_does_not_import_it(name):
    paths = {name_of(path): path for path in FILES}
    waiting, seen = [name] if name in paths else [n for n in paths if n.startswith(f"{name}.")], set()
    assert waiting
    while waiting:
        current = waiting.pop()
        seen.add(current)
        for module, line in imported_at_top(TREES[paths[current]]):
            assert module.partition(".")[0] not in SLOW, f"{paths[current]}:{line} on the way from {name}: {module}"
            other = module.removeprefix("distributed.")
            if module.startswith("distributed.") and other in paths and other not in seen:
                waiting.append(other)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_and_functions_are_short_enough_to_read(path):
    assert len(path.read_text().splitlines()) <= 250
    long = [
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > 60
    ]
    assert [text for text in long if (name_of(path), text.partition(":")[0]) != ("recipe", "train")] == []


INNER_COMMANDS = {
    "bench.worker",
    "bench.memory",
    "gpu_check.gloo_latency",
    "gpu_check.rank_runs",
    "gpu_check.steps",
}  # started by other commands, which read what they print


@pytest.mark.parametrize("path", [path for path in FILES if '__name__ == "__main__"' in path.read_text()], ids=name_of)
def test_every_command_outlives_its_terminal(path):
    assert "    run_command(main" in path.read_text() or name_of(path) in INNER_COMMANDS


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_path_on_the_command_line_may_begin_with_a_tilde(path):
    assert "type=Path" not in path.read_text(), "home_path of files.py is the type of a path"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_module_has_a_docstring(path):
    assert ast.get_docstring(TREES[path])


@pytest.mark.parametrize("path", sorted(ROOT.parent.glob("tests/**/test_*.py")), ids=lambda path: path.stem)
def test_names_of_tests_are_short(path):
    names = [node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    assert [name for name in names if name.startswith("test_") and len(name) >= 60] == []


def test_few_modules_are_at_the_root():
    assert len(list(ROOT.glob("*.py"))) <= 16
