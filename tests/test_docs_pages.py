"""The pages hang together: no block that no test reads, no link to nowhere, no option left out."""

import re
import sys
from pathlib import Path

import pytest
import typer
from helpers.documents import PAGES, REPOSITORY, blocks, links

from fastplastic.cli.examples import EXAMPLES
from fastplastic.cli.main import app
from fastplastic.criteria import CRITERIA, WEIGHT_CRITERIA

sys.path.insert(0, str(REPOSITORY / "docs"))
import generated

# What is behind a fence, and what reads such blocks.
LANGUAGES = {
    "sh": "test_docs_commands.py runs it",
    "yaml": "test_docs_commands.py runs the program's lines of it",
    "toml": "test_docs_commands.py writes it to the file that its first line names",
    "python": "test_docs_snippets.py runs it",
    "diff": "test_one_place_for_each_change.py applies it",
    "text": "what the program printed",
    "{toctree}": "sphinx",
    "{eval-rst}": "sphinx",
    "{include}": "sphinx",
}
# How a line of a command or a snippet begins.
_CODE = re.compile(r"\s*(\$ |fastplastic [a-z]+ |pip |python |import |from \w+ import )")


@pytest.mark.parametrize("page", PAGES)
def test_a_test_reads_every_block(page):
    for block in blocks(page):
        kind = block.language.partition(" ")[0]
        assert kind in LANGUAGES, f"{page}:{block.line}: no test reads a block of '{kind}'"
        if kind == "text":
            found = [line for line in block.text.splitlines() if _CODE.match(line)]
            assert not found, f"{page}:{block.line}: not what the program printed: {found}"


def slug(title: str) -> str:
    words = re.sub(r"[^\w\- ]", "", title.lower())
    return words.strip().replace(" ", "-")


def anchors(path: Path) -> set[str]:
    text = path.read_text()
    for mark, make in generated.PARTS.items():
        text = text.replace(mark, make() if mark in text else "")
    return {slug(title) for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_links_lead_somewhere(page):
    path = REPOSITORY / page
    for link in links(page):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), f"{page}: {link}"
        if anchor and target.suffix == ".md":
            known = anchors(target)
            assert anchor in known, f"{page}: {link}: {sorted(known)}"


def test_the_reference_has_every_option_of_every_command():
    text = generated.commands()
    for name, command in typer.main.get_command(app).commands.items():
        section = text.partition(f"## {name}\n")[2].partition("\n## ")[0]
        assert f"fastplastic {name}" in section
        assert all(f"\n\n    fastplastic {line}\n" in f"{section}\n" for _, line in EXAMPLES[name])
        for parameter in command.params:
            for flag in (*parameter.opts, *parameter.secondary_opts):
                shown = f"{flag}`", f"{flag} ", f"{flag},"
                assert any(text in section for text in shown) or not flag.startswith("-"), flag
        for options in re.findall(r"^\| `(.*?)` \| (.*) \|$", section, re.MULTILINE):
            assert options[1].strip(), (name, options)


def test_every_criterion_has_a_section_with_formula_and_source():
    units, weights = generated.criteria_of_units(), generated.criteria_of_weights()
    for found, text in ((CRITERIA, units), (WEIGHT_CRITERIA, weights)):
        for name, criterion in found.items():
            section = re.split(r"^### ", text, flags=re.MULTILINE)
            (own,) = [part for part in section if re.match(rf"{name}( \(weights\))?\n", part)]
            assert f"`{criterion.summary}`" in own and criterion.source in own
    assert "0; 1 for a frozen unit" not in units  # no docstring of another
    assert "The share of positions with abs(f'(z)) <= 0.01; 1 for a frozen unit." in units
    assert "Args:" not in units and "magnitude failed" not in weights.split("### random")[-1]


def test_docstrings_become_rst():
    lines = [
        "Say |x|.", "", "    as it |is|", "", "`Arm`s.", "", "Args:", "    x: A |b|.", "",
        "    more",
    ]  # fmt: skip
    assert generated.as_rst(lines) == [
        "Say \\|x\\|.", "", "::", "", "    as it |is|", "", "`Arm`\\ s.", "", "Args:",
        "    x: A \\|b\\|.", "", "    more",
    ]  # fmt: skip
