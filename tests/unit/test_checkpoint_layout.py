import ast
from pathlib import Path

import pytest

from distributed.run import checkpoint_layout as layout
from distributed.run.checkpoint_layout import name_of, parse_name, sort_names

ROOT = Path(layout.__file__).parents[1]
FILES = [path for path in sorted(ROOT.rglob("*.py")) if path != Path(layout.__file__)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_other_module_spells_file_names_of_checkpoints(path):
    names = {layout.TENSORS, layout.STATE, layout.MANIFEST, layout.DAMAGED_MANIFEST}
    constants = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
    texts = {(node.lineno, node.value) for node in constants if isinstance(node.value, str)}
    assert [(line, text) for line, text in texts if text in names or text.startswith("step-")] == []


@pytest.mark.parametrize(("step", "epoch"), [(0, 0), (313, 1), (123_456_789, 1_234)])
def test_a_name_is_parsed_back(step, epoch):
    assert parse_name(name_of(step=step, epoch=epoch)) == (step, epoch)


@pytest.mark.parametrize(
    "name", ["", "best", "step-1-epoch-1", "step-00000001-epoch-001.damaged", "step-000000001-epoch-001"]
)
def test_other_names_are_not_checkpoints(name):
    assert parse_name(name) is None


def test_names_are_sorted_by_number_not_by_text():
    names = [name_of(step=step, epoch=1) for step in (100_000_000, 99_999_999, 7)]
    assert sort_names([*names, "best", "step-backup"]) == names[::-1]
