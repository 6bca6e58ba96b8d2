"""Folders of torch.distributed.checkpoint are re-initialised as if all had been loaded."""

import copy
import io
import os
import pickle
import shutil
import zipfile

import pytest
import torch
from helpers.many_files import (
    contents,
    expected,
    masks_plan,
    on_meta,
    same_bits,
    save_spread,
    trained,
)
from helpers.processes import Pool
from helpers.written import convnet, deep_mlp, filled
from torch import nn
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.checkpoint.state_dict_loader import load

import fastplastic
from fastplastic.errors import FileError
from fastplastic.files import load_into, load_state_dict

# It says that it works without a process group.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def case():
    return filled(deep_mlp)


def save(folder, content, **options):
    """Write a checkpoint in two files."""
    writer = FileSystemWriter(folder, thread_count=2, **options)
    state_dict_saver.save(content, storage_writer=writer, no_dist=True)
    return folder


def saved(folder, case, optimizer, flat=False):
    """Write a model and its optimizer under the names of the parameters."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    weights, state = get_state_dict(case.model, optimizer, options=options)
    return save(folder, {"model": weights, "optim": state, "epoch": 3, "args": {"lr": 0.1}})


def everything(folder):
    """Return all tensors of a checkpoint."""
    known = FileSystemReader(folder).read_metadata().state_dict_metadata
    found = {name: torch.empty(x.size) for name, x in known.items() if hasattr(x, "size")}
    for name, tensor in found.items():
        found[name] = tensor.to(known[name].properties.dtype)
    load(found, checkpoint_id=folder, no_dist=True)
    return found


def behind(prefix, state):
    return {f"{prefix}{name}": value for name, value in state.items()}


def in_memory(case, plan, optimizer, **treatment):
    """Return weights and optimizer state as `reinit_` leaves them: {name in the checkpoint: x}."""
    model, own = copy.deepcopy((case.model, optimizer))
    fastplastic.reinit_(model, plan, optimizer=own, **treatment)
    names = dict(model.named_parameters())
    state = {
        f"optim.state.{name}.{key}": value
        for name, parameter in names.items()
        for key, value in own.state[parameter].items()
        if isinstance(value, torch.Tensor)
    }
    return behind("model.", model.state_dict()) | state


OPTIMIZERS = [
    (torch.optim.AdamW, {"amsgrad": True}),
    (torch.optim.SGD, {"momentum": 0.9}),
    (torch.optim.Adagrad, {"initial_accumulator_value": 0.25}),
    (torch.optim.Rprop, {}),
]


@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS, ids=lambda x: getattr(x, "__name__", ""))
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
def test_weights_and_optimizer(tmp_path, case, kind, options, flat):
    optimizer = trained(case.model, case.inputs, kind, **options)
    source = saved(tmp_path / "old", case, optimizer, flat)
    before = contents(source)
    report = fastplastic.reinit_checkpoint(source, tmp_path / "new", on_meta(case), case.plan)
    written, wanted = everything(tmp_path / "new"), in_memory(case, case.plan, optimizer)
    assert wanted.items() and same_bits({name: written[name] for name in wanted}, wanted)
    assert not same_bits({name: everything(source)[name] for name in wanted}, wanted)
    assert contents(source) == before
    assert contents(tmp_path / "new")[".metadata"] == before[".metadata"]
    assert report.notes[:1] == ("optim: begins anew for what was re-initialised",)
    assert report.notes[1].startswith("kept as they are: ") and "epoch" in report.notes[1]
    model, own = copy.deepcopy((case.model, optimizer))
    assert report.written == fastplastic.reinit_(model, case.plan, optimizer=own).written


@pytest.mark.parametrize("make", [deep_mlp, convnet])
def test_single_weights_and_other_treatments(tmp_path, make):
    case = filled(make)
    optimizer = trained(case.model, case.inputs)
    source = saved(tmp_path / "old", case, optimizer)
    for number, (plan, treatment) in enumerate(
        [
            (masks_plan(case), {"seed": 2}),
            (case.plan, {"outgoing": "small", "init": "empirical"}),
        ]
    ):
        target = tmp_path / str(number)
        fastplastic.reinit_checkpoint(source, target, on_meta(case), plan, **treatment)
        wanted, written = in_memory(case, plan, optimizer, **treatment), everything(target)
        assert same_bits({name: written[name] for name in wanted}, wanted)


def test_an_optimizer_that_numbers_its_parameters(tmp_path, case):
    optimizer = trained(case.model, case.inputs)
    content = {"model": case.model.state_dict(), "optim": optimizer.state_dict()}
    source = save(tmp_path / "old", content)
    report = fastplastic.reinit_checkpoint(source, tmp_path / "new", on_meta(case), case.plan)
    written, wanted = everything(tmp_path / "new"), in_memory(case, case.plan, optimizer)
    for number, name in enumerate(dict(case.model.named_parameters())):
        for key in ("exp_avg", "exp_avg_sq", "step"):
            there = written[f"optim.state.{number}.{key}"]
            assert torch.equal(there, wanted[f"optim.state.{name}.{key}"])
    assert report.notes == ("optim: begins anew for what was re-initialised",)


def test_state_of_unknown_weights_is_left_and_said(tmp_path, case):
    other = nn.Linear(3, 2)
    optimizer = trained(other, torch.randn(2, 3))
    content = {"model": case.model.state_dict(), "optim": optimizer.state_dict()}
    source = save(tmp_path / "old", content)
    report = fastplastic.reinit_checkpoint(source, tmp_path / "new", on_meta(case), case.plan)
    assert report.notes == (
        "optim: left as it is, as it is not known which state belongs to which weight: begin with "
        "a fresh optimizer",
    )
    old, new = everything(source), everything(tmp_path / "new")
    assert same_bits(*({x: y for x, y in z.items() if "optim" in x} for z in (old, new)))


def test_averaged_weights_come_first_and_all_are_written_alike(tmp_path, case):
    plain = copy.deepcopy(case.model.state_dict())
    averaged = {name: x + 1 for name, x in plain.items()}
    content = {"model": behind("module.", plain), "model_ema": averaged}
    source = save(tmp_path / "old", content)
    report = fastplastic.reinit_checkpoint(source, tmp_path / "new", on_meta(case), case.plan)
    assert report.notes == ("1 other copies of the weights were re-initialised alike",)
    written = everything(tmp_path / "new")
    case.model.load_state_dict(averaged)
    wanted = expected(case.model, case.plan)
    assert same_bits({name: written[f"model_ema.{name}"] for name in wanted}, wanted)
    for name, tensor in wanted.items():
        fresh = tensor != averaged[name]
        there = written[f"model.module.{name}"]
        assert torch.equal(there[fresh], tensor[fresh])
        assert torch.equal(there[~fresh], plain[name][~fresh])
    other = deep_mlp().model
    loaded = load_into(other, source)
    assert same_bits(other.state_dict(), averaged)
    assert loaded.remark == (
        "2 files of torch.distributed.checkpoint; averaged weights, 'model_ema.' removed"
    )


def test_blobs_are_what_torch_saves(tmp_path, case):
    source = save(tmp_path / "old", case.model.state_dict())
    fastplastic.reinit_checkpoint(source, tmp_path / "new", on_meta(case), case.plan)
    places = FileSystemReader(tmp_path / "new").read_metadata().storage_data
    assert len(places) == 6
    for place in places.values():
        blob = (tmp_path / "new" / place.relative_path).read_bytes()[place.offset :]
        # The sums over the bytes are right too.
        assert zipfile.ZipFile(io.BytesIO(blob[: place.length])).testzip() is None


def test_blobs_of_another_length(tmp_path, case, monkeypatch):
    """As older versions of torch write them: the new ones stand at the end of the file."""
    write = torch.save
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", lambda x, f: write(x, f, _use_new_zipfile_serialization=False))
        source = save(tmp_path / "old", {"model": case.model.state_dict(), "epoch": 3})
    before = everything(source)
    fastplastic.reinit_checkpoint(source, tmp_path / "new", on_meta(case), case.plan)
    written, wanted = everything(tmp_path / "new"), expected(case.model, case.plan)
    assert same_bits(written, behind("model.", wanted)) and same_bits(everything(source), before)
    # Twice over is as once over.
    fastplastic.reinit_checkpoint(tmp_path / "new", tmp_path / "newer", on_meta(case), case.plan)
    assert same_bits(everything(tmp_path / "newer"), written)


def test_in_place(tmp_path, case):
    source = save(tmp_path / "old", case.model.state_dict())
    (source / "rng.pt").write_text("x")
    before = contents(source)
    fastplastic.reinit_checkpoint(source, None, on_meta(case), case.plan)
    assert same_bits(everything(source), expected(case.model, case.plan))
    assert contents(tmp_path / "old.bak") == before and (source / "rng.pt").read_text() == "x"


# Several processes


@pytest.fixture(scope="module")
def spread(tmp_path_factory):
    """Return {case: the checkpoint that two processes wrote of it}."""
    folder = tmp_path_factory.mktemp("spread")
    pool = Pool(2, str(folder / "store"))
    try:
        for make in (deep_mlp, convnet):
            assert pool.run(save_spread, str(folder / make.__name__), make) == [0, 1]
    finally:
        pool.close()
    return folder


@pytest.mark.parametrize("make", [deep_mlp, convnet])
def test_tensors_in_parts_over_the_files_of_two_processes(tmp_path, spread, make):
    """The model is cut into parts of rows; this process is alone, and has no process group."""
    source = spread / make.__name__
    case = filled(make)
    known = FileSystemReader(source).read_metadata()
    chunks = [len(x.chunks) for x in known.state_dict_metadata.values() if hasattr(x, "chunks")]
    assert len(list(source.glob("*.distcp"))) == 2 and max(chunks) == 2, chunks
    before = everything(source)
    weights = {x: before[f"model.{x}"] for x in case.model.state_dict()}
    assert not same_bits(weights, case.model.state_dict())
    case.model.load_state_dict(weights)
    optimizer = torch.optim.AdamW(case.model.parameters())
    for name, parameter in case.model.named_parameters():
        optimizer.state[parameter] = {
            key: before[f"optim.state.{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")
        }
    for number, plan in enumerate([case.plan, masks_plan(case)]):
        target = tmp_path / str(number)
        report = fastplastic.reinit_checkpoint(source, target, on_meta(case), plan, seed=9)
        assert "optim: begins anew for what was re-initialised" in report.notes
        wanted, written = in_memory(case, plan, optimizer, seed=9), everything(target)
        assert same_bits({name: written[name] for name in wanted}, wanted)
    other = make().model
    assert load_into(other, source).beside == ("optim", "epoch")
    assert same_bits(other.state_dict(), weights)


def test_a_model_inside_of_the_one_that_was_saved(tmp_path, case):
    outer = nn.ModuleDict({"net": case.model})
    optimizer = trained(case.model, case.inputs)
    weights, state = get_state_dict(outer, optimizer)
    source = save(tmp_path / "old", {"model": weights, "optim": state})
    fastplastic.reinit_checkpoint(source, tmp_path / "new", on_meta(case), case.plan)
    wanted = in_memory(case, case.plan, optimizer)
    written = everything(tmp_path / "new")
    assert same_bits(
        {x.replace(".net.", "."): y for x, y in written.items() if "step" not in x},
        {x: y for x, y in wanted.items() if "step" not in x},
    )


# What is wrong with a checkpoint


def rewritten(folder, change):
    """Change what `.metadata` says."""
    metadata = FileSystemReader(folder).read_metadata()
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def every_place(**changes):
    """Return what changes where each tensor is said to lie."""

    def change(metadata):
        for place in metadata.storage_data.values():
            vars(place).update(changes)

    return change


def elsewhere(metadata):
    metadata.state_dict_metadata["a.weight"].chunks[0].offsets = torch.Size([1, 0])


def in_part(metadata):
    metadata.state_dict_metadata["a.weight"].chunks.clear()


def larger(metadata):
    entry = metadata.state_dict_metadata["a.weight"]
    entry.size = entry.chunks[0].sizes = torch.Size([8, 9])


def nowhere(metadata):
    del metadata.storage_data[next(x for x in metadata.storage_data if x.fqn == "a.weight")]


class Runs:
    """What a pickle of runs."""

    def __reduce__(self):
        return os.mkdir, ("was-run",)


def cut(folder):
    file = max(folder.glob("*.distcp"))
    os.truncate(file, file.stat().st_size - 1)


def spoilt(folder):
    for file in folder.glob("*.distcp"):
        file.write_bytes(b"x" * file.stat().st_size)


DAMAGE = {
    "missing": (lambda x: min(x.glob("*.distcp")).unlink(),
                r"has \S+ in __0_0\.distcp, which is not there: a part of the checkpoint is"),
    "cut off": (cut, r"has \S+ at bytes \d+ to \d+ of __0_1\.distcp, which has \d+: it was cut"),
    "spoilt": (spoilt, "cannot be read"),
    "outside": (lambda x: rewritten(x, every_place(relative_path="../x")), r"in '\.\./x', exp"),
    "before": (lambda x: rewritten(x, every_place(offset=-8)), "at bytes -8 to"),
    "elsewhere": (lambda x: rewritten(x, elsewhere),
                  r"a part of a\.weight at \(1, 0\) of size \(8, 5\), expected one inside \(8, 5"),
    "in part": (lambda x: rewritten(x, in_part), r"has 0 elements of a\.weight in parts, exp"),
    "nowhere": (lambda x: rewritten(x, nowhere), r"has the part of a\.weight at \(0, 0\) nowhere"),
    "extension": (lambda x: rewritten(x, every_place(transform_descriptors=["zstd"])),
                  r"\S+ is stored by an extension \(zstd\), expected plain tensors"),
    "code": (lambda x: (x / ".metadata").write_bytes(pickle.dumps(Runs())),
             r"\.metadata: contains code \(\S+\.mkdir\), more than a list of tensors"),
    "other": (lambda x: (x / ".metadata").write_bytes(pickle.dumps([1])), "holds a list, expecte"),
    "no pickle": (lambda x: (x / ".metadata").write_bytes(b"x"), r"\.metadata: corrupt \("),
    "no list": (lambda x: (x / ".metadata").unlink(),
                r"has parts of a distributed checkpoint \(__0_0\.distcp, \.\.\.\) and no \.meta"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_nothing_is_written(tmp_path, case, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)
    damage, text = DAMAGE[kind]
    source = save(tmp_path / "old", case.model.state_dict())
    damage(source)
    with pytest.raises(FileError, match=text):
        fastplastic.reinit_checkpoint(source, "new", on_meta(case), case.plan)
    with pytest.raises(FileError, match=text):
        load_into(case.model, source)
    assert [x.name for x in tmp_path.iterdir()] == ["old"]


def test_a_part_of_another_size_than_said(tmp_path, case):
    source = save(tmp_path / "old", case.model.state_dict())
    rewritten(source, larger)
    with pytest.raises(FileError, match=r"1 of another shape \(a\.weight \[8, 9\] instead of \[8"):
        fastplastic.reinit_checkpoint(source, tmp_path / "new", on_meta(case), case.plan)
    case.model.a = nn.Linear(9, 8)
    text = r"a part of a\.weight is \(8, 5\), expected \(8, 9\) as \.metadata says: get it anew"
    with pytest.raises(FileError, match=text):
        load_into(case.model, source)


def test_values_that_are_code_are_not_run(tmp_path, case, monkeypatch):
    monkeypatch.chdir(tmp_path)
    optimizer = trained(case.model, case.inputs)
    state = optimizer.state_dict()
    state["param_groups"][0]["lr"] = Runs()
    source = save(tmp_path / "old", {"model": case.model.state_dict(), "optim": state, "x": Runs()})
    load_into(case.model, source)
    with pytest.raises(FileError, match=r"optim\.param_groups\.0\.lr cannot be read \(Weights on"):
        fastplastic.reinit_checkpoint(source, "new", on_meta(case), case.plan)
    assert [x.name for x in tmp_path.iterdir()] == ["old"]


def test_all_tensors_without_a_model(tmp_path, case):
    source = save(tmp_path / "old", {"epoch": 3, **case.model.state_dict()})
    assert same_bits(load_state_dict(source), case.model.state_dict())
    shutil.rmtree(source)
    with pytest.raises(FileError, match="old: no such file"):
        load_state_dict(source)
