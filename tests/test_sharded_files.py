"""Sharded safetensors are re-initialised tensor by tensor, as if all had been loaded."""

import json
import os
import resource
import signal
import struct
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from helpers.many_files import (
    INDEX,
    contents,
    expected,
    masks_plan,
    on_meta,
    read_sharded,
    same_bits,
    save_sharded,
)
from helpers.written import CASES, convnet, deep_mlp, filled
from torch import nn

import fastplastic
from fastplastic.errors import FileError
from fastplastic.files import load_into, load_state_dict

TREATMENTS = [
    {},
    {"outgoing": "small", "init": "empirical"},
    {"outgoing": "fresh", "init": "kaiming_normal", "seed": 5},
    {"outgoing": "keep"},
]


@pytest.fixture
def case():
    return filled(deep_mlp)


@pytest.fixture
def source(tmp_path, case):
    return save_sharded(tmp_path / "old", case.model.state_dict())


@pytest.mark.parametrize("make", CASES)
def test_it_is_as_if_all_had_been_loaded(tmp_path, make):
    case = filled(make)
    source = save_sharded(tmp_path / "old", case.model.state_dict())
    before = contents(source)
    for number, treatment in enumerate(TREATMENTS):
        target = tmp_path / str(number)
        report = fastplastic.reinit_checkpoint(
            source, target, on_meta(case), case.plan, **treatment
        )
        wanted = expected(case.model, case.plan, **treatment)
        assert same_bits(read_sharded(target), wanted)
        assert not same_bits(wanted, case.model.state_dict())
        assert report.count == case.plan.count and {x.name for x in report.written} >= set(
            case.rows
        )
    assert contents(source) == before


def test_single_weights(tmp_path, case, source):
    plan = masks_plan(case)
    fastplastic.reinit_checkpoint(source / INDEX, tmp_path / "new", on_meta(case), plan, seed=4)
    assert same_bits(read_sharded(tmp_path / "new"), expected(case.model, plan, seed=4))


def test_the_report_is_that_of_reinit(tmp_path, case, source):
    report = fastplastic.reinit_checkpoint(source, tmp_path / "new", case.model, case.plan)
    known = fastplastic.reinit_(case.model, case.plan)
    assert (report.written, report.layers, report.shares) == (
        known.written, known.layers, known.shares,
    )  # fmt: skip


def test_files_in_half_precision(tmp_path, case):
    state = {name: x.bfloat16() for name, x in case.model.state_dict().items()}
    source = save_sharded(tmp_path / "old", state)
    case.model.load_state_dict(state)
    wanted = expected(case.model, case.plan)
    fastplastic.reinit_checkpoint(source, tmp_path / "new", on_meta(case), case.plan)
    written = read_sharded(tmp_path / "new")
    assert same_bits(written, {name: x.bfloat16() for name, x in wanted.items()})


def test_tensors_that_do_not_line_up(tmp_path, case):
    """The format lets them begin at any byte."""
    state = case.model.state_dict()
    folder = save_sharded(tmp_path / "old", state, shards=1)
    (file,) = folder.glob("*.safetensors")
    header = {"odd": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}}
    data = b"odd"
    for name, tensor in state.items():
        raw = tensor.numpy().tobytes()
        place = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": place}
        data += raw
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    report = fastplastic.reinit_checkpoint(folder, tmp_path / "new", on_meta(case), case.plan)
    assert same_bits(read_sharded(tmp_path / "new"), expected(case.model, case.plan))
    assert "kept as they are: odd" in report.notes


def test_names_behind_a_prefix(tmp_path, case):
    prefixed = {f"module.{name}": x for name, x in case.model.state_dict().items()}
    source = save_sharded(tmp_path / "old", prefixed)
    fastplastic.reinit_checkpoint(source, tmp_path / "new", on_meta(case), case.plan)
    wanted = {f"module.{x}": tensor for x, tensor in expected(case.model, case.plan).items()}
    assert same_bits(read_sharded(tmp_path / "new"), wanted)


def test_other_files_come_along(tmp_path, case, source):
    for name in (
        "tokenizer.json",
        "pytorch_model.bin",
        "sub/notes.txt",
        ".cache/x",
        "optimizer.pt",
    ):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(name)
    (source / "tokenizer.json").chmod(0o444)
    source.chmod(0o750)
    target = tmp_path / "new"
    report = fastplastic.reinit_checkpoint(source, target, on_meta(case), case.plan)
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(contents(target)) == [
        "config.json", *shards, INDEX, "sub/notes.txt", "tokenizer.json",
    ]  # fmt: skip
    assert report.notes == (
        "left out, as they may hold other weights: optimizer.pt, pytorch_model.bin",
    )
    modes = [(target / x).stat().st_mode & 0o777 for x in (".", shards[0], "tokenizer.json")]
    assert modes == [0o750, 0o640, 0o444]
    assert sorted(x.name for x in tmp_path.iterdir()) == ["new", "old"]


def test_links_of_a_cache_are_not_written_through(tmp_path, case, source):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    source.rename(blobs)
    snapshot.mkdir()
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../blobs/{file.name}")
    (snapshot / "gone.txt").symlink_to("../blobs/gone.txt")
    before = contents(blobs)
    wanted = expected(case.model, case.plan)
    fastplastic.reinit_checkpoint(snapshot, tmp_path / "new", on_meta(case), case.plan)
    assert not any(x.is_symlink() for x in (tmp_path / "new").iterdir())
    fastplastic.reinit_checkpoint(snapshot, None, on_meta(case), case.plan)
    assert contents(blobs) == before
    for folder in (snapshot, tmp_path / "new"):
        assert same_bits(read_sharded(folder), wanted)
    assert (snapshot / "config.json").is_symlink() and (snapshot / "gone.txt").is_symlink()
    assert contents(tmp_path / "snapshot.bak") == before


def test_in_place_by_a_link_to_the_folder(tmp_path, case, source):
    (source / ".hidden").write_text("x")
    (tmp_path / "link").symlink_to("old")
    before = contents(source)
    fastplastic.reinit_checkpoint(tmp_path / "link", None, on_meta(case), case.plan)
    assert (tmp_path / "link").is_symlink() and (source / ".hidden").read_text() == "x"
    wanted = expected(case.model, case.plan)
    assert same_bits(read_sharded(source), wanted) and contents(tmp_path / "old.bak") == before
    with pytest.raises(FileError, match=r"old\.bak: exists already, an older copy: move it away"):
        fastplastic.reinit_checkpoint(source, None, on_meta(case), case.plan)
    written = contents(source)
    fastplastic.reinit_checkpoint(source, None, on_meta(case), case.plan, force=True)
    assert contents(tmp_path / "old.bak") == written
    assert sorted(x.name for x in tmp_path.iterdir()) == ["link", "old", "old.bak"]


def test_what_is_there_already(tmp_path, case, source):
    target = tmp_path / "new"

    def write(**options):
        return fastplastic.reinit_checkpoint(source, target, on_meta(case), case.plan, **options)

    target.mkdir()
    write()
    first = contents(target)
    with pytest.raises(FileError, match="new: is a folder with files: name another, or pass --fo"):
        write(seed=1)
    (target / "model-00001-of-00009.safetensors").write_text("of an older one")
    write(seed=1, force=True)
    assert contents(target).keys() == first.keys() and contents(target) != first
    (target / "mine.txt").write_text("mine")
    with pytest.raises(FileError, match=r"has mine\.txt in it, which the new one has not and woul"):
        write(force=True)
    assert (target / "mine.txt").read_text() == "mine"
    for inside in (source, source / "deep", tmp_path):
        with pytest.raises(FileError, match="is the folder that is read, or in it: name another"):
            fastplastic.reinit_checkpoint(source, inside, on_meta(case), case.plan, force=True)
    with pytest.raises(FileError, match="is a file, expected the name of a folder"):
        fastplastic.reinit_checkpoint(source, target / "mine.txt", on_meta(case), case.plan)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["new", "old"]


# Kills


KILLED = """
import os, signal, sys
from pathlib import Path
from fastplastic.files import atomic_folder as folders
kill = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
path = Path(sys.argv[1])
{patch}
with folders.atomic_folder(path, force=True, backup=path.with_name("bak")) as temporary:
    (temporary / "file").write_text("new")
    {inside}
"""


@pytest.mark.parametrize(
    ("patch", "inside", "left"),
    [
        ("", "kill()", "old"),
        ("os.fsync = kill", "", "old"),
        ("folders._exchanged = kill", "", "old"),
        ("folders._keep = kill", "", "new"),
    ],
    ids=["writing", "syncing", "before the exchange", "after the exchange"],
)
def test_a_kill_leaves_the_old_folder_or_the_new_one(tmp_path, patch, inside, left):
    path = tmp_path / "w"
    path.mkdir()
    (path / "file").write_text("old")
    program = KILLED.format(patch=patch, inside=inside)
    result = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert result.returncode == -signal.SIGKILL
    assert (path / "file").read_text() == left
    # Whichever it is, the other one is whole beside it.
    assert left == "old" or [(x / "file").read_text() for x in tmp_path.glob(".w*")] == ["old"]


@pytest.mark.parametrize("raised", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_failure_at_any_moment_leaves_the_old_folder(tmp_path, case, source, monkeypatch, raised):
    before, calls, stop, fsync = contents(source), 0, 0, os.fsync

    def failing(descriptor):
        nonlocal calls
        calls += 1
        if calls == stop:
            raise raised
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    # Three shards, index and configuration, and the folder that holds them.
    for _ in range(6):
        calls, stop = 0, stop + 1
        error = FileError if isinstance(raised, OSError) else KeyboardInterrupt
        with pytest.raises(error):
            fastplastic.reinit_checkpoint(source, None, on_meta(case), case.plan)
        assert contents(source) == before and [x.name for x in tmp_path.iterdir()] == ["old"]


def test_systems_that_cannot_exchange_names(tmp_path, case, source, monkeypatch):
    monkeypatch.setattr("fastplastic.files.atomic_folder._exchanged", lambda one, other: False)
    before = contents(source)
    fastplastic.reinit_checkpoint(source, None, on_meta(case), case.plan)
    assert same_bits(read_sharded(source), expected(case.model, case.plan))
    assert contents(tmp_path / "old.bak") == before
    assert sorted(x.name for x in tmp_path.iterdir()) == ["old", "old.bak"]


# Memory


def test_memory_is_not_that_of_the_weights(tmp_path):
    """64 MiB of weights: no more than 12 of memory may be had, less than one and a half tensors."""
    size, depth = 1448, 8  # 8 MiB each
    linear = [part for _ in range(depth) for part in (nn.Linear(size, size, bias=False), nn.ReLU())]
    with torch.device("meta"):
        model = nn.Sequential(*linear)
    state = {name: torch.zeros(x.shape) for name, x in model.named_parameters()}
    source = save_sharded(tmp_path / "old", state, shards=4)
    del state
    plan = _every_tenth(model, size, depth)
    # Kernels are compiled for the first call.
    small = filled(convnet)
    warm = save_sharded(tmp_path / "small", small.model.state_dict())
    fastplastic.reinit_checkpoint(warm, tmp_path / "warm", on_meta(small), small.plan)
    with open("/proc/self/status") as file:
        used = 1024 * int(file.read().partition("VmData:")[2].split()[0])
    limit = resource.getrlimit(resource.RLIMIT_DATA)
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (used + 12 * 2**20, limit[1]))
        fastplastic.reinit_checkpoint(source, tmp_path / "new", model, plan)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limit)
    written = read_sharded(tmp_path / "new")
    assert all(written[name][::10].any() for name in list(written)[:-1])


def _every_tenth(model, size, depth):
    from helpers import plan_of_units
    from helpers.written import consumer, layer

    every = torch.arange(size)
    names = [str(2 * i) for i in range(depth)]
    layers = [
        layer(model, name, consumers=(consumer(other, every),), hidden=torch.ones(size) > 0)
        for name, other in pairwise(names)
    ]
    return plan_of_units(model, layers, {name: range(0, size, 10) for name in names[:-1]})


# Reading


def test_shards_are_loaded(tmp_path, case, source):
    before = case.model.state_dict()
    other = deep_mlp().model
    loaded = load_into(other, source)
    assert same_bits(other.state_dict(), before) and loaded.remark == "3 files of safetensors"
    assert same_bits(load_state_dict(source / INDEX), before)


def test_shards_of_pickles_are_loaded_and_not_written(tmp_path, case):
    folder, state = tmp_path / "old", case.model.state_dict()
    folder.mkdir()
    names = list(state)
    files = {x: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, x in enumerate(names)}
    for file in set(files.values()):
        torch.save({x: state[x] for x in names if files[x] == file}, folder / file)
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    other = deep_mlp().model
    assert load_into(other, folder).remark == "2 PyTorch files"
    assert same_bits(other.state_dict(), state)
    with pytest.raises(FileError, match=r"lists PyTorch files, which cannot be written piece by"):
        fastplastic.reinit_checkpoint(folder, tmp_path / "new", on_meta(case), case.plan)
    index.write_text(json.dumps({"weight_map": files | {"ghost": files[names[0]]}}))
    with pytest.raises(FileError, match=r"has ghost in pytorch_model-00001.*does not hold it"):
        load_state_dict(folder)
    torch.save(state, folder / files[names[1]])
    with pytest.raises(FileError, match=r"holds a\.weight, as another file does, expected it in"):
        load_state_dict(folder)
