"""Data sources: the same batches for the same seed, balanced, and errors that name the file."""

import gc
import gzip
import importlib.util
import os
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torch.utils.data import IterableDataset

import fastplastic
from fastplastic.errors import FileError, InputError
from fastplastic.sources import batches
from fastplastic.sources.images import Sample, balanced

MODEL = timm.create_model("test_resnet")


@pytest.fixture
def folder(tmp_path):
    """Six images of one colour in each of three classes."""
    for label, name in enumerate(("ape", "bee", "cat")):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(6):
            image = Image.new("RGB", (20, 12), (80 * label, 10 * number, 0))
            image.save(tmp_path / "data" / name / f"{number}.png")
    return tmp_path / "data"


def collected(source) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*source, strict=True)
    return torch.cat(images), torch.cat(labels)


def source(spec, model=MODEL, **options):
    return batches(spec, model=model, **{"img_size": 16, "batch_size": 5} | options)


# The sample


def test_sample():
    data = batches("sample", model=MODEL, batch_size=16, max_batches=2)
    assert (data.name, data.num_classes, data.samples, len(data)) == ("sample", 10, 32, 2)
    assert data.class_names[7] == "Sneaker"
    images, labels = collected(data)
    assert images.shape == (32, *MODEL.pretrained_cfg["input_size"])
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    for start in range(0, 30, 10):
        assert labels[start : start + 10].sort().values.tolist() == list(range(10))
    config = timm.data.resolve_model_data_config(MODEL)
    transform = timm.data.create_transform(**config)
    pixels = Sample().images[balanced(Sample().labels, 320, 1, seed=0)[0]]
    assert torch.equal(images[0], transform(Image.fromarray(pixels).convert("RGB")))


def test_the_whole_sample_once():
    data = source("sample", batch_size=300)
    images, labels = collected(data)
    assert len(data) == 2
    assert data.samples == len(images) == 320
    assert labels.bincount().tolist() == [32] * 10
    assert len({image.numpy().tobytes() for image in images}) == 320


def test_sample_file_is_compact_and_licensed():
    folder_ = Path(fastplastic.__file__).parent / "sources"
    assert (folder_ / "sample.npz").stat().st_size < 300_000
    assert "Copyright (c) 2017 Zalando SE" in (folder_ / "sample.LICENSE").read_text()
    sample = Sample()
    assert (sample.images.shape, sample.images.dtype) == ((320, 28, 28), np.uint8)
    assert sample.labels == list(range(10)) * 32


def test_make_sample_builds_the_same_file_twice(tmp_path, monkeypatch):
    path = Path(__file__).parents[1] / "benchmarks" / "make_sample.py"
    spec = importlib.util.spec_from_file_location("make_sample", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    labels = np.arange(400, dtype=np.uint8) % 10
    pixels = np.random.default_rng(0).integers(0, 256, (400, 28, 28), np.uint8)
    for name, header, array in (("images-idx3", 16, pixels), ("labels-idx1", 8, labels)):
        content = gzip.compress(bytes(header) + array.tobytes())
        (tmp_path / f"train-{name}-ubyte.gz").write_bytes(content)
    for name in "ab":
        arguments = ["make_sample", "--originals", str(tmp_path), "-o", str(tmp_path / name)]
        monkeypatch.setattr("sys.argv", arguments)
        module.main()
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with np.load(tmp_path / "a", allow_pickle=False) as made:
        assert made["labels"].tolist() == list(range(10)) * 32
        known = {image.tobytes(): label for image, label in zip(pixels, labels, strict=True)}
        found = [known[image.tobytes()] for image in made["images"]]
        assert found == made["labels"].tolist()
        assert len({image.tobytes() for image in made["images"]}) == 320


# The same batches


@pytest.mark.parametrize("spec", ["sample", "noise", "folder"])
def test_iterating_again_and_other_seeds(spec, folder):
    spec = folder if spec == "folder" else spec
    data = source(spec, max_batches=2, seed=3)
    first, again = collected(data), collected(data)
    same, other = (collected(source(spec, max_batches=2, seed=seed)) for seed in (3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize(("spec", "workers"), [("sample", 0), ("noise", 0), ("folder", 2)])
def test_no_global_random_state_and_no_output(spec, workers, folder, capfd):
    def state():
        numpy = np.random.get_state()
        return torch.get_rng_state().tolist(), random.getstate(), numpy[1].tolist(), numpy[2]

    before = state()
    collected(source(folder if spec == "folder" else spec, max_batches=2, workers=workers))
    assert state() == before
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("count", [0, 1, 3, 5, 7])
def test_balanced_takes_each_class_in_turn(count):
    labels = [0] * 4 + [1] * 2 + [2]
    chosen = balanced(labels, 7, count, seed=1)
    assert len(set(chosen)) == len(chosen) == count
    assert {labels[index] for index in chosen[:3]} == {0, 1, 2} or count < 3
    assert [labels[index] for index in chosen[5:]] == [0] * max(0, count - 5)
    assert sorted(balanced(None, 7, 7, seed=1)) == list(range(7))


# The model's form


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels(channels):
    model = timm.create_model("test_resnet", in_chans=channels)
    images, _ = collected(batches("sample", model=model, max_batches=1, batch_size=2))
    assert images.shape == (2, channels, 160, 160)
    assert model.eval()(images).shape == (2, 1000)
    if channels == 4:
        assert torch.equal(images[:, 0], images[:, 3])
        mean, std = (np.mean(MODEL.pretrained_cfg[key]) for key in ("mean", "std"))
        torch.testing.assert_close(images.min().item(), -mean / std)


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"img_size": 24}, (3, 24, 24)),
        ({"img_size": (24, 32)}, (3, 24, 32)),
        ({"img_size": None, "input_size": (1, 24, 32)}, (1, 24, 32)),
        ({"in_chans": 2}, (2, 16, 16)),
    ],
)
@pytest.mark.parametrize("spec", ["sample", "noise"])
def test_sizes(spec, options, shape):
    images, _ = collected(source(spec, max_batches=1, **options))
    assert images.shape == (5, *shape)


def test_the_size_the_model_was_made_for():
    model = timm.create_model("test_vit", img_size=64)
    images, _ = collected(batches("sample", model=model, max_batches=1, batch_size=2))
    assert images.shape == (2, 3, 64, 64)


def test_models_that_are_not_of_timm():
    images, _ = collected(batches("sample", model=nn.Flatten(), max_batches=1, batch_size=2))
    assert images.shape == (2, 3, 224, 224)


def test_noise():
    model = timm.create_model("test_resnet", num_classes=7)
    data = source("noise", model, img_size=40, batch_size=8, max_batches=3)
    images, labels = collected(data)
    assert (data.num_classes, data.class_names, data.samples, len(data)) == (7, None, 24, 3)
    assert labels.unique().tolist() == list(range(7))
    assert abs(images.mean()) < 0.01
    assert abs(images.std() - 1) < 0.01
    with pytest.raises(InputError, match="noise has no end: expected a number of batches"):
        source("noise")


# Folders


def test_folder(folder):
    data = source(folder, max_batches=1, batch_size=3)
    assert (data.name, data.class_names, data.samples) == (str(folder), ("ape", "bee", "cat"), 3)
    _, labels = collected(data)
    assert labels.sort().values.tolist() == [0, 1, 2], "not the first class only"
    whole = source(folder, max_batches=99)
    assert (whole.samples, len(whole)) == (18, 4)
    images, labels = collected(whole)
    assert labels.bincount().tolist() == [6, 6, 6]
    red = images[:, 0].mean((1, 2))
    assert red[labels == 0].max() < red[labels == 1].min() < red[labels == 2].min()
    workers = collected(source(folder, workers=2))
    assert torch.equal(workers[0], images)
    assert torch.equal(workers[1], labels)


@pytest.mark.parametrize(("asked", "started"), [(0, 0), (1, 1), (10**6, os.cpu_count())])
def test_no_more_workers_than_processors(folder, monkeypatch, asked, started):
    options = {}
    monkeypatch.setattr(
        "fastplastic.sources.data.DataLoader", lambda *_, **given: options.update(given) or []
    )
    assert list(source(folder, workers=asked)) == []
    assert options["num_workers"] == started


def test_folder_of_splits(folder, tmp_path):
    (tmp_path / "all").mkdir()
    folder.rename(tmp_path / "all" / "val")
    (tmp_path / "all" / "train" / "dog").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "all" / "train" / "dog" / "1.png")
    assert source(tmp_path / "all").class_names == ("ape", "bee", "cat")


# timm keeps the tar file open until the reader is collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_tar_file_without_timms_pickled_index(folder, tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "data.tar", "w") as tar:
        tar.add(folder, "data")
    create, options = timm.data.create_dataset, {}

    def spy(**given):
        options.update(given)
        return create(**given)

    monkeypatch.setattr(timm.data, "create_dataset", spy)
    data = source(tmp_path / "data.tar")
    assert data.class_names == ("ape", "bee", "cat")
    assert collected(data)[1].bincount().tolist() == [6, 6, 6]
    assert options["cache_tarinfo"] is False
    del data
    gc.collect()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "content", [b"", b"no image", "cut"], ids=["empty", "text", "cut in the middle"]
)
def test_corrupt_images_are_left_out_and_named(folder, content, workers, capfd):
    path = folder / "bee" / "3.png"
    path.write_bytes(path.read_bytes()[:50] if content == "cut" else content)
    data = source(folder, workers=workers)
    for _ in range(2):
        images, labels = collected(data)
        assert labels.bincount().tolist() == [6, 5, 6] and len(images) == 17
        ((name, why),) = data.left_out.items()
        assert name == str(path) and "\n" not in why
        assert why == ("OSError: image file is truncated" if content == "cut" else "no image")
    assert capfd.readouterr() == ("", "")


def test_folders_without_images(tmp_path):
    (tmp_path / "empty" / "ape").mkdir(parents=True)
    (tmp_path / "empty" / "ape" / "notes.txt").touch()
    with pytest.raises(FileError) as error:
        source(tmp_path / "empty")
    assert str(error.value) == (
        f"{tmp_path / 'empty'}: no images found, expected class folders with .jpg, .jpeg or .png "
        "files: check the folder"
    )


def test_one_class_teaches_nothing(folder):
    with pytest.raises(FileError) as error:
        source(folder / "ape")
    assert "has no class folders, only images, expected at least two class folders" in str(
        error.value
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "none",
            ": no such folder, expected a folder of class folders, 'sample', 'noise' or a name",
        ),
        ("file.txt", ": is a file, expected a folder of class folders"),
        ("broken.tar", ": cannot be opened (ReadError: "),
    ],
)
def test_folders_that_are_none(tmp_path, name, text):
    (tmp_path / "file.txt").write_text("text")
    (tmp_path / "broken.tar").write_text("text")
    with pytest.raises(FileError) as error:
        source(tmp_path / name)
    assert str(error.value).startswith(f"{tmp_path / name}{text}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"max_batches": 0}])
def test_numbers_below_one(options):
    with pytest.raises(InputError, match=r"expected 1 or more: correct them"):
        source("sample", **options)
    with pytest.raises(InputError, match=r"input size \[3, 0, 0\]: expected numbers above 0"):
        source("sample", img_size=0)


# timm's datasets


def test_torchvision_dataset(folder):
    data = source(f"torch/image_folder@{folder}")
    assert data.class_names == ("ape", "bee", "cat")
    assert torch.equal(collected(data)[0], collected(source(folder))[0])


@pytest.mark.parametrize(
    ("name", "error", "text"),
    [
        ("torch/nope", FileError, "torch/nope: cannot be opened (AssertionError: Unknown torchvis"),
        (
            "torch/image_folder@/none",
            FileError,
            "torch/image_folder@/none: cannot be opened (FileN",
        ),
        ("wds/@/none", FileError, "wds/@/none: "),
    ],
)
def test_datasets_that_are_not_there(name, error, text, monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    if name.startswith("wds"):
        error, text = InputError, "wds/@/none: needs a library (ModuleNotFoundError: No module"
        monkeypatch.setattr(timm.data, "create_dataset", missing_library)
    with pytest.raises(error) as caught:
        source(name)
    assert str(caught.value).startswith(text)
    assert capfd.readouterr() == ("", "")


def missing_library(**_):
    print("Please install")
    raise ModuleNotFoundError("No module named 'webdataset'")


class Stream(IterableDataset):
    """A dataset as timm makes them of streams."""

    def __init__(self, labels: list, classes: int = 3, end: bool = True) -> None:
        self.labels, self.end = labels, end
        self.reader = Stream.Reader()
        self.reader.class_to_idx = {str(number): number for number in range(classes)}

    class Reader:
        pass

    def __iter__(self):
        for label in self.labels:
            yield Image.new("RGB", (8, 8), (label, 0, 0)), label
        if not self.end:
            raise ConnectionResetError("gone")


def test_streams(monkeypatch):
    monkeypatch.setattr(timm.data, "create_dataset", lambda **_: Stream([0, 1, 2, 0, 1, 2, 0]))
    data = source("wds/x", batch_size=2, max_batches=2)
    assert (data.num_classes, data.samples, len(data)) == (3, 4, 2)
    assert collected(data)[1].tolist() == collected(data)[1].tolist() == [0, 1, 2, 0]
    assert [len(labels) for _, labels in source("wds/x", batch_size=4, max_batches=9)] == [4, 3]
    with pytest.raises(InputError, match="wds/x: a stream: expected a number of batches"):
        source("wds/x")


@pytest.mark.parametrize(
    ("stream", "text"),
    [
        (Stream([0, 3]), "image 1 of wds/x: label 3, expected 0 to 2: correct the labels"),
        (Stream([0], end=False), "wds/x: broke off at image 1 (ConnectionResetError: gone)"),
    ],
)
def test_streams_that_break(monkeypatch, stream, text):
    monkeypatch.setattr(timm.data, "create_dataset", lambda **_: stream)
    with pytest.raises(FileError) as error:
        collected(source("wds/x", max_batches=1))
    assert str(error.value).startswith(text)
