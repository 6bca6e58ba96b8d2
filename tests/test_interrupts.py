"""Ctrl-C and SIGTERM in the middle of a file: one line, exit code 130, nothing left behind."""

import signal
import subprocess
import sys

import pytest

# Stops in the middle of the first file of weights that is written.
PROGRAM = """
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
ARGUMENTS = ("reinit", "test_resnet", "--no-pretrained", "--ratio", "0.1", "--img-size", "32")
MORE = ("-b", "2", "--batches", "1", "--force", "--quiet", "-o")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_write_leaves_the_old_file_alone(tmp_path, number):
    path = tmp_path / "fresh.safetensors"
    path.write_text("old")
    command = [sys.executable, "-c", PROGRAM, *ARGUMENTS, *MORE, str(path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # A shell that starts this in the background has its children ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:  # fmt: skip
        assert process.stdout.readline() == "writing\n"
        assert len(list(tmp_path.iterdir())) == 2
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.splitlines()[-1] == "fastplastic: error: interrupted"
    assert [entry.name for entry in tmp_path.iterdir()] == ["fresh.safetensors"]
    assert path.read_text() == "old"
