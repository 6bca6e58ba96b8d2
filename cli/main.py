"""The program: reads the arguments, runs one command, turns every outcome into an exit code."""

import io
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Annotated, Any, TextIO

import typer

import fastplastic
from fastplastic.cli import (
    compare,
    compare_options,
    config,
    examples,
    explain,
    finetune,
    launch,
    listing,
    options,
    parsing,
    plan,
    profile,
    reinit,
    training_options,
    trial,
)
from fastplastic.cli.interrupts import Terminated, terminate
from fastplastic.cli.outcomes import Outcome
from fastplastic.cli.terminal import printable
from fastplastic.errors import FileError, GateError, InputError, ProcessError

# Typer carries its own copy of click, whose base class of usage errors has no public name.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]
_DONE, _UNEXPECTED, _USAGE, _FILE, _GATE, _INTERRUPTED, _TERMINATED = 0, 1, 2, 3, 4, 130, 143

_PAIR = re.compile(r"[A-Za-z_]\w*=")

app = typer.Typer(
    name="fastplastic",
    cls=examples.ProgramWithExamples,
    add_completion=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
# With what becomes of them where torchrun starts several processes.
_COMMANDS: dict[str, tuple[type[Any], Callable[[Any], None]]] = {
    "profile": (options.ProfileOptions, launch.together(profile.run)),
    "compare": (compare_options.CompareOptions, launch.by_first(compare.run)),
    "plan": (options.PlanOptions, launch.together(plan.run)),
    "reinit": (options.ReinitOptions, launch.together(reinit.run)),
    "trial": (training_options.TrialOptions, launch.together(trial.run)),
    "finetune": (training_options.FinetuneOptions, launch.by_itself(finetune.run)),
    "explain": (explain.ExplainOptions, launch.by_first(explain.run)),
    "list": (listing.ListOptions, launch.by_first(listing.run)),
}
_CONFIG = config.config_option({name: kept for name, (kept, _) in _COMMANDS.items()})
for _name, (_options, _run_it) in _COMMANDS.items():
    app.command(_name, cls=examples.CommandWithExamples)(
        parsing.command(_options, _run_it, _CONFIG)
    )


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"fastplastic {fastplastic.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _program(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    """Find the units of a model that no longer learn, and re-initialise them."""
    if context.invoked_subcommand is None:
        print(context.get_help())


def _spread_model_kwargs(arguments: Sequence[str]) -> Iterator[str]:
    """Repeat --model-kwargs before each KEY=VALUE after it: timm takes several at once."""
    spreading = False
    for argument, following in pairwise([*arguments, ""]):
        if spreading and _PAIR.match(argument):
            yield f"--model-kwargs={argument}"
            continue
        spreading = argument == "--model-kwargs" and bool(_PAIR.match(following))
        if not spreading:
            yield argument


def _outcome(error: BaseException) -> tuple[int, tuple[str, ...]]:
    """Return the exit code for an exception, and the lines to print."""
    if isinstance(error, KeyboardInterrupt):
        return _TERMINATED if isinstance(error, Terminated) else _INTERRUPTED, ("interrupted",)
    if isinstance(error, _UsageError):
        message = getattr(error, "format_message", error.__str__)().replace("Value error, ", "")
        program = getattr(getattr(error, "ctx", None), "command_path", "fastplastic")
        where = config.origin_of(error)
        return _USAGE, (f"{message.rstrip('.')}{where}: see {program} --help",)
    if isinstance(error, GateError):
        return _GATE, error.args
    if isinstance(error, InputError):
        return _USAGE, (str(error),)
    if isinstance(error, FileError):
        return _FILE, (str(error),)
    if isinstance(error, ProcessError):
        return _UNEXPECTED, (str(error),)
    return _UNEXPECTED, (f"{type(error).__name__}: {error} (FASTPLASTIC_DEBUG=1 shows where)",)


def _run(arguments: Sequence[str]) -> int:
    typed = parsing.TYPED.set(tuple(arguments))
    try:
        action = app(list(_spread_model_kwargs(arguments)), "fastplastic", standalone_mode=False)
        # --help and --version are done by now, and leave the exit code in place of a command.
        if action == _INTERRUPTED:
            raise KeyboardInterrupt  # which typer has taken while it read the arguments
        if callable(action):
            action()
        sys.stdout.flush()
        return _DONE
    except BrokenPipeError:
        # The reader of our output has gone: what is left unwritten must not fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _UNEXPECTED
    finally:
        parsing.TYPED.reset(typed)


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end the program as Ctrl-C does: what is half written is taken away."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        # Without a name where it was not set from Python.
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code; `arguments` are those of the process if None."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    debug = bool(os.environ.get("FASTPLASTIC_DEBUG"))
    if not (debug or sys.warnoptions):
        # The libraries below warn about themselves; what matters to the user, the commands say.
        warnings.simplefilter("ignore")
    shown = sys.stderr if debug else None
    with launch.others_silent():
        own = _attempt(sys.argv[1:] if arguments is None else arguments, shown)
    return launch.end(own, _say_error)


def _attempt(arguments: Sequence[str], shown: TextIO | None) -> Outcome:
    """Run the program, and print the traceback of what it raises, if it is to be shown."""
    try:
        with _terminable():
            return Outcome(_run(arguments))
    # Not Exception alone: Ctrl-C ends the program in one line too.
    except (Exception, KeyboardInterrupt) as error:
        if shown:
            traceback.print_exc(file=shown)
        code, lines = _outcome(error)
        # Torch says in words of its own that another process is gone.
        lost = isinstance(error, RuntimeError) and "gloo" in str(error)
        return Outcome(code, lines, isinstance(error, ProcessError) or lost)


def _say_error(line: str) -> None:
    print(f"fastplastic: error: {printable(line)}", file=sys.stderr)
