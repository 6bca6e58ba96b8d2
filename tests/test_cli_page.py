"""`fastplastic profile --html` and `--csv` on a small model."""

import csv
import hashlib
import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.pages import parsed
from helpers.program import MODEL, SMALL, refused, weights_before

from fastplastic.cli.options import DataOptions
from fastplastic.cli.page import DataDigest
from fastplastic.cli.parsing import TYPED
from fastplastic.sources import batches


def facts_of(page, name):
    found = page.one("section", id=name) if name else page.one("header")
    return [(line.one("dt").text, line.one("dd").text) for line in found.all("div")]


def test_a_page_beside_the_report(run):
    arguments = ["profile", *SMALL, "--html", "a page.html", "--json", "same.json"]
    outcome = run(*arguments)
    assert (outcome.code, outcome.error) == (0, "")
    assert "next: fastplastic plan" in outcome.output
    page = parsed(Path("a page.html").read_text(encoding="utf-8"))
    assert page.one("h1").text == f"Plasticity profile of {MODEL}"
    assert {("model", MODEL), ("weights", "random")} <= set(facts_of(page, None))
    typed = page.one("section", id="reproduce").one("pre").text
    assert shlex.split(typed) == ["fastplastic", *arguments]
    names = [row.inside[1].text for row in page.one("table", id="layers").one("tbody").all("tr")]
    assert names == [layer["name"] for layer in json.loads(Path("same.json").read_text())["layers"]]
    assert TYPED.get() == ()


def test_the_same_command_makes_the_same_page(run):
    arguments = ["profile", *SMALL, "--html", "page.html", "--force", "--quiet"]
    assert run(*arguments) == (0, "", "")
    before = Path("page.html").read_bytes()
    assert run(*arguments) == (0, "", "")
    assert Path("page.html").read_bytes() == before


def test_the_page_of_a_file_of_options_tells_all_of_them(run):
    text = 'pretrained = false\nimg-size = 32\nbatch-size = 4\nbatches = 2\nhtml = "page.html"'
    Path("exp.toml").write_text(text)
    assert run("profile", MODEL, "--config", "exp.toml", "--seed", "3", "-q").code == 0
    page = parsed(Path("page.html").read_text(encoding="utf-8"))
    command = shlex.split(page.one("section", id="reproduce").one("pre").text)
    assert command[:3] == ["fastplastic", "profile", MODEL]
    told = "--no-pretrained --img-size 32 --seed 3 --batches 2 --batch-size 4 --html page.html"
    assert command[3:] == told.split()


def source(seed):
    from fastplastic.sources import create_model

    model = create_model(MODEL, pretrained=False, img_size=32).model
    return batches("sample", model=model, batch_size=4, max_batches=2, img_size=32, seed=seed)


def test_the_digest_is_of_the_images_and_labels_that_were_read(run):
    run("profile", *SMALL, "--html", "page.html", "--seed", "3")
    facts = dict(facts_of(parsed(Path("page.html").read_text()), "reproduce"))
    parts = []
    for images, labels in source(3):
        part = hashlib.sha256()
        for tensor in (images, labels):
            part.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
            part.update(tensor.numpy().tobytes())
        parts.append(part.hexdigest())
    expected = hashlib.sha256("\n".join(sorted(parts)).encode())
    assert facts["data"] == f"sha256 {expected.hexdigest()}"
    assert facts["seed"] == "3"


def digest_of(found):
    digest = DataDigest()
    watched = digest.watch(found)
    assert digest.value is None
    assert len(list(watched)) == len(found)
    assert digest.value is not None
    return digest.value


def test_other_data_have_another_digest():
    first = source(0)
    assert digest_of(first) == digest_of(first) != digest_of(source(1))

    def other_batches():
        images, labels = (torch.cat(parts) for parts in zip(*first, strict=True))
        yield images, labels

    assert digest_of(replace(first, make=other_batches, batch_size=8)) != digest_of(first)


def test_the_first_reading_counts():
    digest, first, second = DataDigest(), source(0), source(1)
    makers = iter((first.make, second.make))
    watched = digest.watch(replace(first, make=lambda: next(makers)()))
    assert len(list(watched)) == len(list(watched)) == 2
    assert digest.value == digest_of(first)


def test_data_that_were_not_read_to_the_end_have_no_digest():
    digest = DataDigest()
    reading = iter(digest.watch(source(0)))
    next(reading), next(reading)
    assert digest.value is None


def test_trained_weights_have_their_advice_in_the_page(run):
    torch.save(weights_before(seed=5), "weights.pth")
    trained = (MODEL, "--checkpoint", "weights.pth", *SMALL[2:])
    assert run("profile", *trained, "--html", "page.html", "--quiet").code == 0
    facts = dict(facts_of(parsed(Path("page.html").read_text()), None))
    assert "likely to help" in facts["advice"]
    assert facts["weights"] == "checkpoint: weights.pth"


def test_a_page_without_jinja2_is_refused_before_anything_slow(run, nothing_slow, monkeypatch):
    monkeypatch.setattr("fastplastic.cli.page.write.find_spec", lambda name: None)
    text = "--html needs jinja2: pip install 'fastplastic[report]', or leave it out\n"
    outcome = run("profile", "m", "--html", "page.html")
    assert outcome == (2, "", f"fastplastic: error: {text}")


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        ("--html old.html", 3, "old.html exists: give another name, or --force to overwrite it"),
        ("--csv old.html", 3, "old.html exists: give another name, or --force to overwrite it"),
        ("--html none/a.html", 3, "cannot write none/a.html: there is no folder none: make it"),
        ("--html a.txt", 2, "--html a.txt: expected a name that ends in .html or .htm"),
        ("--html -", 2, "--html -: expected a name that ends in .html or .htm"),
        ("--json a.html --html ./a.html", 2, "two outputs are a.html: give each of them another"),
        ("--json a --csv folder/../a", 2, "two outputs are folder/../a: give each of them anot"),
        ("--json - --csv -", 2, "two outputs are -: give each of them another name"),
    ],
)
def test_outputs_that_cannot_be_are_refused_before_anything_slow(
    run, nothing_slow, arguments, code, text
):
    Path("old.html").write_text("old")
    Path("folder").mkdir()
    refused(run("profile", "m", *arguments.split()), code, text)
    assert Path("old.html").read_text() == "old"


def test_csv_has_the_layers_of_the_json(run):
    assert run("profile", *SMALL, "--csv", "a.csv", "--json", "a.json", "--ranks", "-q").code == 0
    layers = json.loads(Path("a.json").read_text())["layers"]
    with Path("a.csv").open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header[:5] == ["name", "kind", "activation", "units", "hidden"]
    assert header[-5:] == [
        "ranks.effective_rank", "ranks.srank", "ranks.stable_rank", "ranks.rows", "ranks.units",
    ]  # fmt: skip
    assert len(rows) == len(layers)
    for row, layer in zip(rows, layers, strict=True):
        ranks = {f"ranks.{name}": value for name, value in layer.pop("ranks").items()}
        expected = {"name": None, **layer, **ranks}
        assert row == ["" if x is None else str(x) for x in expected.values()]


def test_csv_on_stdout_is_all_there_is_on_stdout(run):
    outcome = run("profile", *SMALL, "--csv", "-")
    assert (outcome.code, outcome.error) == (0, "")
    lines = outcome.output.splitlines()
    assert lines[0].startswith("name,kind,activation,units,hidden,dead,frozen,dormant,")
    assert len({line.count(",") for line in lines}) == 1


def test_the_command_to_type_next_names_no_output():
    assert not {"html", "csv"} & set(DataOptions.__dataclass_fields__)
