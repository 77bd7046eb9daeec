"""The package's layout: which room may import which, and how long its pieces may be."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "dd_lightning").rglob("*.py"))


def lint(folder):
    """import-linter on the package in `folder`: its exit code, and what it says."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()", "--no-cache"]
    done = subprocess.run(command, cwd=folder, env={"PYTHONPATH": str(folder)}, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(ROOT / "dd_lightning", tmp_path / "dd_lightning", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_arrows_point_downwards(copy):
    code, said = lint(copy)
    assert code == 0, said


@pytest.mark.parametrize(
    ("importing", "imported"),
    [
        ("system/checks.py", "dd_lightning.networks"),
        ("networks/lenet.py", "dd_lightning.data"),
        ("unroll/interface.py", "dd_lightning.distilled"),
        ("distiller.py", "dd_lightning.training"),
        ("report/tables.py", "dd_lightning.evaluation"),
        ("unroll/layers.py", "dd_lightning.unroll.rules"),  # a circle inside a room
    ],
)
def test_a_wrong_import_is_told(copy, importing, imported):
    path = copy / "dd_lightning" / importing
    path.write_text(path.read_text() + f"\nimport {imported}\n")
    code, said = lint(copy)
    assert code == 1
    assert "BROKEN" in said
    assert imported.rpartition(".")[2] in said


def test_a_room_that_no_contract_knows_is_told(copy):
    (copy / "dd_lightning" / "drawer.py").touch()
    code, said = lint(copy)
    assert code == 1
    assert "drawer" in said


def test_no_file_or_function_is_long():
    too_long = [str(path) for path in SOURCES if len(path.read_text().splitlines()) > 300]
    too_long += [str(p) for p in SOURCES if p.parent.name == "commands" and len(p.read_text().splitlines()) >= 200]
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 40:
                too_long.append(f"{path}: {node.name}")
    assert not too_long


def test_the_top_holds_the_method_alone():
    found = {path.name for path in (ROOT / "dd_lightning").glob("*.py")}
    assert found == {"__init__.py", "distiller.py", "distilled.py", "objectives.py", "outer.py", "linear.py"}
