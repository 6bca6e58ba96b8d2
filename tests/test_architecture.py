"""The directions of dependency: cli -> fastplastic -> kernels -> torch, triton, numba.

All is read off the folders, so that a new file is guarded without being listed.
"""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
FOLDERS = {
    "fastplastic": Path(find_spec("fastplastic").origin).parent,
    "fastplastic.kernels": Path(find_spec("fastplastic.kernels").origin).parent,
    "fastplastic.cli": Path(find_spec("fastplastic.cli").origin).parent,
}
# Each room may import those before it, and the kernels.
ROOMS = [
    "errors", "naming", "notebook", "wiring", "randomness", "processes", "stats", "criteria",
    "diagnostics", "model", "files", "graph", "measure", "comparison", "planning", "initial",
    "reinit", "training", "trials", "sources", "integrations", "cli", "__main__",
]  # fmt: skip


def modules() -> dict[str, Path]:
    """Return {dotted name: file} of every module of the package."""
    found = {}
    for package, folder in FOLDERS.items():
        for file in folder.rglob("*.py"):
            inside = file.relative_to(folder)
            # In an installed wheel these two lie in the folder of the package.
            if package == "fastplastic" and inside.parts[0] in ("kernels", "cli"):
                continue
            parts = [package, *inside.with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = file
    return found


MODULES = modules()
PACKAGES = {name for name, file in MODULES.items() if file.name == "__init__.py"}


def imports(file: Path) -> set[str]:
    """Return every module that a file imports anywhere, and every name it takes from a module."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file.name}: a relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def own(name: str) -> set[str]:
    """Return the modules of ours that a module imports."""
    found = {part for part in imports(MODULES[name]) if part in MODULES}
    # Of a module the package around it says nothing.
    return {x for x in found if not any(other.startswith(f"{x}.") for other in found)} - {name}


def room(name: str) -> str:
    """Return the room of a module: the part after the package."""
    return f"{name}.".split(".")[1]


LIBRARY = [name for name in MODULES if room(name) not in ("", "kernels")]


def test_reading_imports(tmp_path):
    file = tmp_path / "module.py"
    file.write_text("import a.b\nfrom c import d\ndef f():\n    from g.h import i\n")
    assert imports(file) == {"a.b", "c", "c.d", "g.h", "g.h.i"}
    assert len(MODULES) > 100 and own("fastplastic.cli.plan") >= {"fastplastic.cli.session"}


@pytest.mark.parametrize("name", [name for name in MODULES if room(name) == "kernels"])
def test_kernels_import_nothing_else_of_ours(name):
    assert {room(other) for other in own(name)} <= {"kernels"}


def test_no_backend_imports_another():
    """But the reference, which is the judge of all, and what it leaves to it."""
    for name in MODULES:
        backend = name.removeprefix("fastplastic.kernels.").partition(".")[0]
        others = {"cpu": "gpu", "gpu": "cpu"}
        if backend in others:
            assert not any(x.split(".")[2:3] == [others[backend]] for x in own(name)), name


@pytest.mark.parametrize("name", LIBRARY)
def test_imports_point_one_way(name):
    before = {*ROOMS[: ROOMS.index(room(name))], room(name), "kernels", ""}
    assert {room(other) for other in own(name)} <= before


FRAMEWORKS = {"transformers", "lightning", "accelerate", "peft", "tensorboard"}


@pytest.mark.parametrize("name", LIBRARY)
def test_frameworks_stand_in_the_modules_of_their_own(name):
    """Nobody else loads them, and nobody loads these modules but their users."""
    if room(name) != "integrations":
        assert "integrations" not in {room(other) for other in own(name)}
    used = {part.partition(".")[0] for part in imports(MODULES[name])} & FRAMEWORKS
    with_frameworks = room(name) in ("integrations", "sources")
    assert used <= ({name.rpartition(".")[2]} if with_frameworks else set())
    assert not own(name) & {f"fastplastic.integrations.{framework}" for framework in FRAMEWORKS}


PURE = [name for name in LIBRARY if room(name) in ("criteria", "diagnostics", "stats", "planning")]


@pytest.mark.parametrize("name", PURE)
def test_statistics_criteria_and_planner_see_no_model(name):
    forbidden = {"graph", "reinit", "initial", "sources"}
    # Single weights are selected where they are, by scores that the kernels make.
    with_kernels = ("fastplastic.planning.weights", "fastplastic.criteria")
    forbidden |= set() if name in with_kernels else {"kernels"}
    assert not {room(other) for other in own(name)} & forbidden
    assert not {"timm", "torch.nn", "transformers"} & imports(MODULES[name])


@pytest.mark.parametrize("name", LIBRARY)
def test_other_rooms_are_entered_by_the_door(name):
    """What the `__init__` of a package exports is public, nothing else is."""
    for module, names in taken_from(MODULES[name]):
        # Only the program itself enters the command line.
        if module in MODULES and room(module) not in ("", room(name), "cli"):
            package = ".".join(module.split(".")[:2])
            assert module == package, f"{name} imports {module}"
            if package in PACKAGES:
                assert names <= set(import_module(package).__all__), f"{name} takes {names}"


def taken_from(file: Path) -> Iterator[tuple[str, set[str]]]:
    """Yield (module, names) of every import of names from a module of ours."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("fastplastic."):
            yield node.module, {alias.name for alias in node.names}


def test_no_module_leads_back_to_itself():
    graph = {name: own(name) for name in MODULES if name not in PACKAGES}
    left = dict(graph)
    while left:
        ends = [name for name, others in left.items() if not others & left.keys()]
        assert ends, f"a circle among {sorted(left)}"
        for name in ends:
            del left[name]


def test_names_of_modules():
    """No underscore inside of packages, and no module that hides a function or is hidden by one."""
    for name in MODULES.keys() - PACKAGES:
        stem = name.rpartition(".")[2]
        assert not stem.startswith("_") or stem == "__main__", name
    for package in PACKAGES:
        exported = set(getattr(import_module(package), "__all__", ()))
        stems = {x.removeprefix(f"{package}.").partition(".")[0] for x in MODULES if x != package}
        assert not exported & stems, package


def test_every_kernel_has_one_stem_in_all_backends():
    stems = {"activation_stats", "gradient_stats", "parameter_stats", "select", "resample"}
    for backend in ("gpu", "cpu", "reference"):
        folder = FOLDERS["fastplastic.kernels"] / backend
        assert stems <= {file.stem for file in folder.glob("*.py")}


def test_every_package_is_listed():
    """What is not listed is missing from the wheel, and from the wheel only."""
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    assert set(settings["tool"]["setuptools"]["packages"]) == PACKAGES


def in_place_copies(tree: ast.AST) -> list[int]:
    """Return the lines that write into a parameter or a buffer of a module in the ways we would."""
    writers = {"copy_", "index_copy_", "index_fill_", "load_state_dict", "set_", "masked_fill_"}
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    return [
        node.lineno
        for node in calls
        if isinstance(node.func, ast.Attribute) and node.func.attr in writers
    ]


# Files load weights, and a model that was run gets its buffers back.
WRITERS = {"reinit", "files", "kernels"}
LEFT_AS_FOUND = "fastplastic.model.left_as_found"
# These write to what they remember themselves, and have it back from a checkpoint.
REMEMBERING = {
    "fastplastic.training.recycler",
    "fastplastic.training.replacement",
    "fastplastic.integrations.follower",
}


@pytest.mark.parametrize("name", LIBRARY)
def test_only_reinit_writes_to_weights(name):
    if room(name) not in WRITERS and name not in {LEFT_AS_FOUND, *REMEMBERING}:
        assert not in_place_copies(ast.parse(MODULES[name].read_text()))


def loaded_by(code: str) -> set[str]:
    program = f"{code}\nimport sys\nprint()\nprint(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return {name.partition(".")[0] for name in result.stdout.splitlines()[-1].split()}


def test_import_loads_no_other_library():
    heavy = {"torch", "numpy", "timm", "triton", "numba", "rich", "typer", "safetensors"}
    heavy |= {"jinja2", "pandas"}
    assert not loaded_by("import fastplastic") & heavy


def test_public_names_load_no_model_library():
    loaded = loaded_by(
        "import fastplastic\nfor name in fastplastic.__all__: getattr(fastplastic, name)"
    )
    assert not loaded & {"timm", "triton", "numba", "rich", "typer", "transformers", "pandas"}


@pytest.mark.parametrize(
    "arguments", ["--help", "--version", "profile --help", "compare --help", "profile"]
)
def test_help_and_version_do_not_load_torch(arguments):
    code = f"from fastplastic.cli.main import main\nmain({arguments.split()!r})"
    assert not loaded_by(code) & {"torch", "numpy", "timm", "numba", "triton"}


def test_every_class_name_stands_once():
    """Whoever reads a name knows which class it is."""
    found: dict[str, list[str]] = {}
    for module, file in MODULES.items():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(module)
    assert not {name: modules for name, modules in found.items() if len(modules) > 1}
