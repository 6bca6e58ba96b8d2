"""Set-up for all tests: what has to be decided before triton is imported."""

import gc
import os
from collections import namedtuple

import pytest
import torch
from hypothesis import settings
from torch.utils._pytree import tree_leaves

HAS_GPU = torch.cuda.is_available()
# Triton reads this when it is imported: without a GPU its kernels run in the interpreter.
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

# Threads that wait for each other on a busy core cost more than they gain, and small models gain
# nothing from many. Tests of several threads ask for them.
if "OMP_NUM_THREADS" not in os.environ:
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, min(2, (os.cpu_count() or 1) // workers)))

# No test depends on the clock, and a failure found once is found again.
settings.register_profile("fastplastic", deadline=None, derandomize=True)
settings.load_profile("fastplastic")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Not above: the helpers import triton.
    from helpers.browser import CHROMIUM

    needed = {"gpu": (HAS_GPU, "a GPU"), "chromium": (CHROMIUM is not None, "Chromium")}
    absent = {marker: what for marker, (there, what) in needed.items() if not there}
    for item in items:
        for marker, what in absent.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=f"needs {what}"))
    # What takes a minute begins at once, or the other processes wait for it at the end.
    items.sort(key=lambda item: item.path.stem != "test_triton_compile")


def pytest_collection_finish() -> None:
    # What is loaded by now stays, and is much: the garbage collector need not look at it again.
    gc.freeze()


Outcome = namedtuple("Outcome", "code output error")


@pytest.fixture(scope="session")
def traced():
    """Return the traces of small models that the program was run on, by what they depend on."""
    return {}


@pytest.fixture
def traced_once(monkeypatch, traced):
    """Trace a small model once for all tests that take it, by name, with inputs of one form."""
    from fastplastic.graph import build
    from fastplastic.graph.trace import export_program

    def export_once(model, inputs, mode):
        if sum(parameter.numel() for parameter in model.parameters()) > 1e6:
            return export_program(model, inputs, mode)
        tensors = [*tree_leaves(inputs), *model.parameters()]
        forms = [(x.shape, x.stride(), x.dtype) for x in tensors if isinstance(x, torch.Tensor)]
        key = type(model), repr(model), str(forms), mode
        if key not in traced:
            traced[key] = export_program(model, inputs, mode)
        return traced[key]

    monkeypatch.setattr(build, "export_program", export_once)


@pytest.fixture
def run(capsys, monkeypatch, tmp_path, traced_once):
    """Run the program in an empty folder, into a pipe, with the model hub out of reach."""
    monkeypatch.chdir(tmp_path)
    # Workers that run tests side by side may set it.
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))

    from fastplastic.cli.main import main

    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture
def nothing_slow(monkeypatch):
    """Make every test fail that gets as far as building a model."""

    def load(*arguments, **keywords):
        raise AssertionError("a model was built")

    monkeypatch.setattr("fastplastic.cli.session.load", load)
    monkeypatch.setattr("fastplastic.cli.reinit.load", load)
