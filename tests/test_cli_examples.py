"""The examples of --help: each is read as the program reads what is typed, and shown unbroken."""

import shlex
from pathlib import Path

import pytest
import typer

from fastplastic.cli.examples import EXAMPLES, WAY, lines_of
from fastplastic.cli.main import app
from fastplastic.comparison import parse_gates
from fastplastic.trials import DEFAULT_ARMS, with_controls

ALL = [command for examples in (*EXAMPLES.values(), WAY) for _, command in examples]


def test_every_command_has_some():
    assert list(EXAMPLES) == list(typer.main.get_command(app).commands)
    for command, examples in EXAMPLES.items():
        assert 2 <= len(examples) <= 4
        assert all(line.split()[0] == command for _, line in examples)
    assert {line.split()[0] for _, line in WAY} == set(EXAMPLES)
    purposes = [purpose for examples in (*EXAMPLES.values(), WAY) for purpose, _ in examples]
    assert max(map(len, purposes)) <= 80 - len("   # ")


@pytest.mark.parametrize("line", sorted(set(ALL)))
def test_every_example_is_taken_by_the_program(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("my.pth", "plan.json"):
        if f"-o {name}" not in line:
            Path(name).touch()
    Path("exp.toml").write_text('model = "resnet50"')
    options = app(shlex.split(line), standalone_mode=False).args[0]
    if hasattr(options, "check"):
        options.check()
    # What is read later than the rest.
    parse_gates(getattr(options, "fail_if", []))
    if line.startswith("trial"):
        with_controls(options.arm or DEFAULT_ARMS)


@pytest.mark.parametrize("line", ALL)
def test_commands_are_broken_as_a_shell_takes_them(line):
    lines = lines_of(line)
    assert max(map(len, lines)) <= 80
    assert all(part.endswith(" \\") for part in lines[:-1])
    # A shell drops both; shlex does not.
    joined = "\n".join(lines).replace("\\\n", "")
    assert shlex.split(joined) == ["fastplastic", *shlex.split(line)]


@pytest.mark.parametrize("width", [40, 160])
@pytest.mark.parametrize("command", ["", *EXAMPLES])
def test_help_ends_with_them_as_they_are_to_be_typed(run, monkeypatch, command, width):
    monkeypatch.setenv("COLUMNS", str(width))
    _, _, shown = run(*command.split(), "--help").output.partition(" Examples\n")
    expected = [
        part
        for purpose, line in EXAMPLES.get(command, WAY)
        for part in ("", f"   # {purpose}", *lines_of(line))
    ]
    assert shown.rstrip().splitlines() == expected
