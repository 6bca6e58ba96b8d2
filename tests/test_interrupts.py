"""Ctrl-C and SIGTERM at any moment: one line, the exit code, nothing left behind."""

import os
import signal
import subprocess
import sys

import pytest

from fastplastic.cli import main as program

# Stops in the middle of the first file of weights that is written.
WRITING = """
import sys, time
from fastplastic.cli.main import main
from fastplastic.files import checkpoint

def half(tensors, path, header):
    path.write_bytes(b"half of a file")
    print("writing", flush=True)
    time.sleep(60)

checkpoint.save_file = half
sys.exit(main(sys.argv[1:]))
"""
# Writes a file, as a program would that swallows what Python makes of a signal.
DEAF = """
import sys, time
from fastplastic.__main__ import run
from fastplastic.cli import main
from fastplastic.files import atomic_write

def deaf():
    with atomic_write(sys.argv[-1], force=True) as temporary:
        temporary.write_text("half of a file")
        print("writing", flush=True)
        while True:
            try:
                time.sleep(60)
            except BaseException:
                pass

main.main = deaf
run()
"""
ARGUMENTS = ("reinit", "test_resnet", "--no-pretrained", "--ratio", "0.1", "--img-size", "32")
MORE = ("-b", "2", "--batches", "1", "--force", "--quiet", "-o")


@pytest.mark.parametrize(
    ("source", "number", "code"),
    [(WRITING, signal.SIGINT, 130), (DEAF, signal.SIGTERM, 143), (DEAF, signal.SIGINT, 130)],
    ids=["Ctrl-C", "SIGTERM, swallowed", "Ctrl-C, swallowed"],
)
def test_an_interrupted_write_leaves_the_old_file_alone(tmp_path, source, number, code):
    path = tmp_path / "fresh.safetensors"
    path.write_text("old")
    command = [sys.executable, "-c", source, *ARGUMENTS, *MORE, str(path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # A shell that starts this in the background has its children ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:  # fmt: skip
        assert process.stdout.readline() == "writing\n"
        assert len(list(tmp_path.iterdir())) == 2
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
    assert process.returncode == code
    assert error.splitlines()[-1] == "fastplastic: error: interrupted"
    assert [entry.name for entry in tmp_path.iterdir()] == ["fresh.safetensors"]
    assert path.read_text() == "old"


def raises(number):
    """Return a function that sends this process a signal, whatever it is called with."""

    def interrupt(*given, **more):
        os.kill(os.getpid(), number)
        raise AssertionError("the signal was not seen")

    return interrupt


# In the course of `reinit`: loading, reading data, tracing, measuring, choosing, writing.
MOMENTS = [
    "fastplastic.sources.create_model", "fastplastic.sources.data.collate_readable",
    "fastplastic.graph.build.export_program", "fastplastic.profile", "fastplastic.plan",
    "fastplastic.sources.saving.save_state_dict",
]  # fmt: skip


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_every_moment(run, monkeypatch, tmp_path, moment, number, code):
    monkeypatch.setattr(moment, raises(number))
    path = tmp_path / "fresh.safetensors"
    path.write_text("old")
    outcome = run(*ARGUMENTS, *MORE, path)
    assert outcome.code == code, outcome.error
    assert outcome.error.splitlines()[-1] == "fastplastic: error: interrupted"
    assert "Traceback" not in outcome.error and path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir() if entry.name != "hub"] == [path.name]


def test_while_the_arguments_are_read(run, monkeypatch):
    """Typer makes an exit code of it, with which nothing would be done and all seem well."""
    monkeypatch.setattr(program, "app", lambda *given, **more: 130)
    assert run("list", "criteria") == (130, "", "fastplastic: error: interrupted\n")


LOADING = """
import os, signal, sys
from fastplastic.__main__ import run

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "typer":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
run()
"""


def test_while_the_program_loads():
    command = [sys.executable, "-c", LOADING, "list", "criteria"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "fastplastic: error: interrupted\n"
