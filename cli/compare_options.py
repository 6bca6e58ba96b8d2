"""The options of `fastplastic compare`. Nothing here imports torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from fastplastic.cli.gates import GateOptions
from fastplastic.cli.outputs import STDOUT, check_outputs, check_suffix
from fastplastic.cli.parsing import option
from fastplastic.errors import InputError

_OUTPUT = "Output"
# Layers that are shown where nothing else is asked for.
TOP = 20


@dataclass(frozen=True, kw_only=True)
class CompareOptions(GateOptions):
    """The options of `fastplastic compare`."""

    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE",
            help="Two profiles or more: JSON, or saved ones; - reads JSON from stdin.",
        ),
    ]
    top: Annotated[
        int | None,
        option(
            "--top",
            panel=_OUTPUT,
            min=1,
            help=f"Show this many layers, the most changed first. (default: {TOP})",
        ),
    ] = None
    layers: Annotated[bool, option("--layers", panel=_OUTPUT, help="Show all layers.")] = False
    json: Annotated[
        Path | None,
        option("--json", panel=_OUTPUT, metavar="FILE|-", help="Write the comparison as JSON."),
    ] = None
    html: Annotated[
        Path | None,
        option("--html", panel=_OUTPUT, metavar="FILE", help="Write a page to read and pass on."),
    ] = None
    force: Annotated[
        bool, option("--force", panel=_OUTPUT, help="Overwrite a file that exists.")
    ] = False
    quiet: Annotated[
        bool, option("--quiet", "-q", panel=_OUTPUT, help="Print errors and warnings only.")
    ] = False

    def check(self) -> None:
        """Refuse what can be refused before a file is read: InputError or FileError."""
        if len(self.files) < 2:
            raise InputError(
                f"{self.files[0]} alone cannot be compared: name two profiles or more, as in "
                "fastplastic compare before.json after.json"
            )
        if self.files.count(STDOUT) > 1:
            raise InputError("- stands twice: stdin can be read once, name a file for the other")
        if self.layers and self.top:
            raise InputError(f"--top {self.top} beside --layers, which shows all: drop one")
        check_suffix("--html", self.html, ".html", ".htm")
        for flag, path in (("--json", self.json), ("--html", self.html)):
            if path and path != STDOUT and path.resolve() in self._inputs():
                raise InputError(f"{flag} {path} is one of the profiles: name another file")
        check_outputs([self.json, self.html], force=self.force)

    def _inputs(self) -> list[Path]:
        return [file.resolve() for file in self.files if file != STDOUT]
