import random
import shutil

import numpy as np
import pytest
import timm
import torch
from helpers.pictures import folder

from fastplastic.errors import FileError, InputError
from fastplastic.sources import Augmentation, WantedSplits, split_data
from fastplastic.trials.loop import seed_all

MODEL = timm.create_model("test_resnet", num_classes=3, in_chans=3)


def split(path, img_size=32, **values):
    wanted = WantedSplits(**{"batch_size": 4} | values)
    return split_data(path, model=MODEL, img_size=img_size, wanted=wanted)


def labels(loader):
    return torch.cat([y for _, y in loader]).tolist()


@pytest.mark.parametrize("held_out", ["val", "validation", "test"])
def test_folders_for_training_and_test(tmp_path, held_out):
    folder(tmp_path / "train")
    folder(tmp_path / held_out, each=5, first=100)
    found = split(tmp_path)
    assert dict(found.sizes) == {"train": 24, "test": 15} and found.num_classes == 3
    assert found.tested_on == f"split {held_out}" and found.warnings == ()
    assert len(found.train) == 6 and sorted(labels(found.test)) == [0] * 5 + [1] * 5 + [2] * 5
    images, _ = next(iter(found.train))
    assert images.shape == (4, 3, 32, 32) and images.dtype == torch.float32
    # Class balanced, so that the first images are of all classes.
    assert set(labels(found.plain)[:3]) == {0, 1, 2}


def test_class_folders_alone_are_split_by_a_share(tmp_path):
    folder(tmp_path, each=10)
    found = split(tmp_path)
    assert dict(found.sizes) == {"train": 24, "test": 6}
    assert found.tested_on == "20% of the images, drawn by seed 0"
    assert sorted(labels(found.test)) == [0, 0, 1, 1, 2, 2]
    half = split(tmp_path, val_split="0.5", validation_share=0.2)
    assert dict(half.sizes) == {"train": 12, "test": 15, "validation": 3}
    assert split(tmp_path, seed=1).digest != found.digest == split(tmp_path).digest
    seen = {x.mean().item() for loader in (half.plain, half.test, half.validation)
            for batch, _ in loader for x in batch}  # fmt: skip
    assert len(seen) == 30, "an image is in two parts, or in none"


def test_the_order_and_augmentation_follow_the_global_seed(tmp_path):
    folder(tmp_path, each=10)
    loader = split(tmp_path, augmentation=Augmentation(scale=(0.2, 1.0), re_prob=0.5)).train

    def epoch(seed):
        torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)
        return torch.cat([x for x, _ in loader])

    assert torch.equal(epoch(1), epoch(1)) and not torch.equal(epoch(1), epoch(2))


def test_workers_follow_the_seed_too(tmp_path):
    folder(tmp_path, each=10)
    loader = split(tmp_path, workers=2, augmentation=Augmentation(scale=(0.2, 1.0))).train

    def epoch(seed):
        seed_all(loader, seed, 0)
        return torch.cat([x for x, _ in loader])

    assert torch.equal(epoch(1), epoch(1)) and not torch.equal(epoch(1), epoch(2))


def test_augmentation_can_be_left_out(tmp_path):
    folder(tmp_path, each=10)
    plain = split(tmp_path, augmentation=Augmentation(no_aug=True))
    torch.manual_seed(0)
    one = {round(x.mean().item(), 4) for batch, _ in plain.train for x in batch}
    every = {round(x.mean().item(), 4) for batch, _ in plain.plain for x in batch}
    assert one <= every


def test_the_sample_and_a_grey_model():
    model = timm.create_model("test_resnet", num_classes=10, in_chans=1)
    found = split_data("sample", model=model, img_size=32)
    assert dict(found.sizes) == {"train": 260, "test": 60} and found.num_classes == 10
    assert next(iter(found.test))[0].shape[1:] == (1, 32, 32)


def test_the_same_image_on_both_sides_is_told(tmp_path):
    folder(tmp_path / "train")
    folder(tmp_path / "val", each=5, first=100)
    assert split(tmp_path).warnings == ()
    shutil.copy(tmp_path / "train/a/3.png", tmp_path / "val/a/copy.png")
    (text,) = split(tmp_path).warnings
    assert "1 image of the test is among the training images too" in text
    shutil.copy(tmp_path / "train/b/3.png", tmp_path / "val/b/copy.png")
    assert "2 images of the test are among" in split(tmp_path).warnings[0]


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    folder(tmp_path, each=10)
    for file in tmp_path.rglob("*.png"):
        file.write_bytes(b"nothing")
    with pytest.raises(FileError, match=r"\.png: cannot be read as an image"):
        list(split(tmp_path).train)


def test_classes_that_differ(tmp_path):
    folder(tmp_path / "train", classes=("a", "b", "c"))
    folder(tmp_path / "val", classes=("a", "b", "d"))
    with pytest.raises(FileError, match="c in training only; d in val only"):
        split(tmp_path)


def test_one_class(tmp_path):
    folder(tmp_path, classes=("a",))
    with pytest.raises(FileError, match=r"has 1 class \(a\), expected at least two"):
        split(tmp_path)


def test_fewer_images_than_a_batch(tmp_path):
    folder(tmp_path, each=10)
    with pytest.raises(InputError, match="24 training images, expected at least a batch of 32"):
        split(tmp_path, batch_size=32)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"val_split": "1.5"}, "val_split 1.5: expected the name of a split or a share"),
        ({"val_split": "0.001"}, "cannot be split at a share of 0.001"),
    ],
)
def test_shares_that_are_none(tmp_path, values, said):
    folder(tmp_path)
    with pytest.raises(InputError, match=said):
        split(tmp_path, **values)


def test_a_split_that_is_not_there(tmp_path):
    folder(tmp_path / "train")
    with pytest.raises(FileError, match="has no folder holdout, expected one with the same"):
        split(tmp_path, val_split="holdout")


def test_data_without_labels(tmp_path, monkeypatch):
    folder(tmp_path)
    monkeypatch.setattr("fastplastic.sources.images._labels", lambda reader: None)
    with pytest.raises((InputError, FileError), match=r"has no labels|class"):
        split(tmp_path)
    with pytest.raises(InputError, match="noise has no labels"):
        split_data("noise", model=MODEL)


def test_nothing_there(tmp_path):
    with pytest.raises(FileError, match="no such folder"):
        split(tmp_path / "missing")
    with pytest.raises(FileError, match="no images found"):
        split(tmp_path)
