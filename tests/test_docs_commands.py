"""Every command of the README and of docs is run, page by page, on small models and images.

What takes the place of what is large stands in `helpers.documents`: `STAND_INS`, `SHORTER` and
`GIVEN`.
"""

import re
import tomllib

import pytest
from helpers.documents import (
    PAGES,
    REPOSITORY,
    blocks,
    commands,
    prepare,
    replace_models,
    shorter,
)

# Commands that are not run here, what is looked at instead, and why.
NOT_RUN = {
    "python3 -m venv": "takes minutes; .ci/run makes such an environment",
    ".": "enters the environment",
    "source": "enters the environment",
    "pip install": "takes minutes; that it names extras that exist is checked here",
    ".venv/bin/pip install": "as pip install",
    ".venv/bin/pytest": "these are the tests",
    ".venv/bin/ruff": ".ci/run does",
    ".ci/run": "runs these tests",
    "sphinx-build": ".ci/run does",
    "OMP_NUM_THREADS=1 fastplastic trial": "starts Ray; test_trial_engines.py does, once",
    "fastplastic trial resnet50 --data DIR --engine ray": "starts Ray, as above",
    "torchrun": "starts processes that import torch; test_trial_engines.py does, once",
    "python benchmarks/pretrained.py": "test_pretrained.py does; a small file takes its place",
}
# What is random decides whether a condition holds; a file of options may have one too.
GATED = (0, 4)
WITH_COMMANDS = [page for page in PAGES if any(block.language == "sh" for block in blocks(page))]


def reason_not_run(words: list[str]) -> str | None:
    line = " ".join(words)
    return next((why for what, why in NOT_RUN.items() if f"{line} ".startswith(f"{what} ")), None)


@pytest.mark.parametrize("page", WITH_COMMANDS)
def test_the_commands_of_a_page_do_what_it_says(run, monkeypatch, tmp_path, page):
    replace_models(monkeypatch)
    prepare(page, tmp_path)
    for words in commands(page):
        if reason_not_run(words):
            continue
        assert words[0] == "fastplastic", f"{page}: {words} is neither run nor in NOT_RUN"
        outcome = run(*words[1:], *shorter(words))
        expected = GATED if {"--fail-if", "--config"} & set(words) else (0,)
        assert outcome.code in expected, f"{page}: {words}: {outcome.error}"
        for flag in ("-o", "--json", "--html", "--csv", "--plot"):
            if flag in words and (file := words[words.index(flag) + 1]) != "-":
                assert (tmp_path / file).stat().st_size, f"{page}: {words}"


@pytest.mark.parametrize("page", PAGES)
def test_extras_and_scripts_that_a_page_names_exist(page):
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    text = (REPOSITORY / page).read_text()
    for extras in re.findall(r"(?:-e \"?\.|fastplastic)\[([a-z,]+)\]", text):
        assert set(extras.split(",")) <= set(project["optional-dependencies"]), (page, extras)
    for words in commands(page):
        for word in words:
            if word.startswith("benchmarks/"):
                assert (REPOSITORY / word).is_file(), (page, word)


def test_the_command_that_runs_the_tests_is_where_ci_looks():
    text = (REPOSITORY / "README.md").read_text()
    (command,) = re.findall(r"<!-- tests -->\n```sh\n(.*)\n```\n", text)
    assert command.endswith(".venv/bin/pytest -n auto") and "test" in command
    assert "<!-- tests -->" in (REPOSITORY / ".ci" / "run").read_text()


def test_the_readme_is_short_and_takes_five_commands():
    text = (REPOSITORY / "README.md").read_text()
    assert text.count("\n") < 150
    first = next(block for block in blocks("README.md") if block.language == "sh")
    assert first.text.count("\n") == 5 and "finetune" in first.text.splitlines()[-1]
