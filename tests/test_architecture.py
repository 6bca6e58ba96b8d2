"""The directions of dependency: cli -> fastplastic -> kernels -> torch, triton, numba."""

import ast
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

LIBRARY = Path(find_spec("fastplastic").origin).parent
KERNELS = Path(find_spec("fastplastic.kernels").origin).parent
CLI = Path(find_spec("fastplastic.cli").origin).parent


def absolute(node: ast.ImportFrom, package: str) -> str:
    if not node.level:
        return node.module
    parent = package.split(".")[: len(package.split(".")) - node.level + 1]
    return ".".join([*parent, *([node.module] if node.module else [])])


def imports(file: Path, package: str) -> set[str]:
    """Return every module that a file imports anywhere, and every name it takes from a package."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = absolute(node, package)
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def own(file: Path, package: str) -> set[str]:
    """Return the modules of fastplastic that a file imports, by their short name."""
    names = (name.split(".") for name in imports(file, package))
    return {part[1] for part in names if part[0] == "fastplastic" and len(part) > 1}


def library(name: str) -> set[str]:
    return own(LIBRARY / f"{name}.py", "fastplastic")


def test_reading_imports(tmp_path):
    file = tmp_path / "module.py"
    file.write_text(
        "import a.b\nfrom . import c\nfrom .d import e\ndef f():\n    from g import h\n"
    )
    assert imports(file, "p.q") == {"a.b", "p.q", "p.q.c", "p.q.d", "p.q.d.e", "g", "g.h"}


@pytest.mark.parametrize("file", sorted(KERNELS.glob("*.py")), ids=lambda file: file.name)
def test_kernels_import_nothing_else_of_ours(file):
    assert own(file, "fastplastic.kernels") <= {"kernels"}


@pytest.mark.parametrize("file", sorted(LIBRARY.glob("*.py")), ids=lambda file: file.name)
def test_library_does_not_import_the_command_line(file):
    allowed = {"cli"} if file.name == "__main__.py" else set()
    assert own(file, "fastplastic") & {"cli"} <= allowed


PLANNER = ["planner", "quotas", "_request", "_unit_plan", "_weight_plan"]


@pytest.mark.parametrize("name", ["criteria", "diagnostics", "stats", *PLANNER])
def test_statistics_criteria_and_planner_see_no_model(name):
    forbidden = {"graph", "monitor", "reinit", "initializers", "models", "data"}
    # Single weights are selected where they are.
    forbidden |= set() if name == "_weight_plan" else {"kernels"}
    assert not library(name) & forbidden
    assert not {"timm", "torch.nn", "transformers"} & imports(LIBRARY / f"{name}.py", "fastplastic")


@pytest.mark.parametrize("name", ["graph", "monitor", "profile"])
def test_measuring_knows_nothing_of_writing(name):
    assert not library(name) & {"reinit", "initializers", "planner"}


def in_place_copies(tree: ast.AST) -> list[int]:
    """Return the lines that write into a parameter or a buffer of a module in the ways we would."""
    writers = {"copy_", "index_copy_", "index_fill_", "load_state_dict", "set_", "masked_fill_"}
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    return [
        node.lineno
        for node in calls
        if isinstance(node.func, ast.Attribute) and node.func.attr in writers
    ]


@pytest.mark.parametrize(
    "name", ["criteria", "stats", "graph", "profile", "wiring", "data", "_weights", *PLANNER]
)
def test_only_reinit_writes_to_weights(name):
    assert not in_place_copies(ast.parse((LIBRARY / f"{name}.py").read_text()))


def loaded_by(code: str) -> set[str]:
    program = f"{code}\nimport sys\nprint()\nprint(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return {name.partition(".")[0] for name in result.stdout.splitlines()[-1].split()}


def test_import_loads_no_other_library():
    heavy = {"torch", "numpy", "timm", "triton", "numba", "rich", "typer", "safetensors"}
    assert not loaded_by("import fastplastic") & heavy


@pytest.mark.parametrize("name", ["profile", "plan", "reinit_", "Monitor", "Plan"])
def test_public_names_load_no_model_library(name):
    loaded = loaded_by(f"import fastplastic; fastplastic.{name}")
    assert not loaded & {"timm", "triton", "numba", "rich", "typer", "transformers"}


@pytest.mark.parametrize("arguments", ["--help", "--version", "profile --help", "profile"])
def test_help_and_version_do_not_load_torch(arguments):
    code = f"from fastplastic.cli.main import main\nmain({arguments.split()!r})"
    assert not loaded_by(code) & {"torch", "numpy", "timm", "numba", "triton"}
