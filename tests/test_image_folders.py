"""What folders of images may hold beside images: left out with a word, or refused."""

import os
import re
import struct
import zlib
from pathlib import Path

import pytest
import timm
import torch
from helpers.pictures import folder as pictures
from PIL import Image

from fastplastic.errors import FileError
from fastplastic.sources import WantedSplits, batches, split_data

MODEL = timm.create_model("test_resnet")


@pytest.fixture
def folder(tmp_path):
    return pictures(tmp_path / "data", ("ape", "bee", "cat"), each=6)


def source(spec, **options):
    return batches(spec, model=MODEL, **{"img_size": 16, "batch_size": 5} | options)


def labels_of(data) -> list[int]:
    """Return the number of images of each class."""
    return torch.cat([labels for _, labels in data]).bincount().tolist()


def test_a_batch_of_corrupt_images_and_a_folder_of_them(folder):
    for path in folder.glob("bee/*.png"):
        path.write_bytes(b"")
    data = source(folder, batch_size=1)
    assert len(list(data)) == 12 and len(data.left_out) == 6
    for path in folder.glob("*/*.png"):
        path.write_bytes(b"")
    with pytest.raises(FileError) as error:
        list(source(folder))
    assert re.fullmatch(
        rf"{folder}: none of 18 images can be read, expected some: the first is "
        rf"{folder}/\w+/\d.png \(no image\)",
        str(error.value),
    )


def png_of(width, height):
    """Return the first bytes of a picture that is larger than any memory, in a hundred bytes."""

    def chunk(kind, content):
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"")
    chunks = (chunk(b"IHDR", head), chunk(b"IDAT", data), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_what_is_no_image_or_a_trap_is_left_out(folder):
    """Pipes and huge pictures would take all time or memory."""
    os.mkfifo(folder / "ape" / "pipe.png")
    (folder / "bee" / "gone.png").symlink_to("nowhere.png")
    (folder / "bee" / "self.png").symlink_to("self.png")
    (folder / "cat" / "bomb.png").write_bytes(png_of(60_000, 60_000))
    data = source(folder)
    assert labels_of(data) == [6, 6, 6]
    found = {Path(name).name: why for name, why in data.left_out.items()}
    assert found["pipe.png"] == "OSError: not a regular file"
    assert found["bomb.png"].startswith("DecompressionBombError: Image size (3600000000 pixels)")
    assert "No such file" in found["gone.png"] and "symbolic links" in found["self.png"]
    # To fine-tune on, all images are needed.
    with pytest.raises(FileError, match=r"cannot be read as an image \(.*: repair or remove the"):
        split_data(folder, model=MODEL, wanted=WantedSplits(batch_size=2))


def test_names_that_are_no_text(folder):
    odd = os.fsdecode(b"\xff\n\x1b[31m")
    (folder / "ape").rename(folder / odd)
    (folder / "bee" / "1.png").rename(folder / "bee" / f"{odd}.png")
    data = source(folder)
    assert labels_of(data) == [6, 6, 6] and odd in data.class_names


def test_a_folder_that_cannot_be_read_is_no_empty_class(folder, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("bee"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(FileError) as error:
        source(folder)
    assert str(error.value) == (
        f"{folder}/bee: cannot be read (Permission denied), so its images would be left out: "
        "correct its permissions, or take it away"
    )


@pytest.mark.parametrize(("at", "to"), [("ape/up", ".."), ("ape/here", "."), ("up", "../..")])
def test_links_that_lead_back(folder, at, to):
    """The library below would count the images up to forty times, those of a class as another."""
    (folder / at).symlink_to(to)
    with pytest.raises(FileError) as error:
        source(folder)
    real = (folder / at).resolve()
    assert str(error.value) == (
        f"{folder}/{at}: is a link to a folder around it, {real}, so its images would be counted "
        "again and again: remove the link"
    )


def test_two_folders_that_link_to_each_other(folder):
    (folder / "ape" / "to").symlink_to("../bee")
    (folder / "bee" / "to").symlink_to("../ape")
    with pytest.raises(FileError, match="is a link to a folder around it"):
        source(folder)


def test_links_to_folders_elsewhere_are_classes(folder, tmp_path):
    (folder / "cat").rename(tmp_path / "far")
    (folder / "cat").symlink_to(tmp_path / "far")
    data = source(folder)
    assert labels_of(data) == [6, 6, 6] and data.warnings == ()


def test_what_is_left_out_of_a_folder_is_said(folder, tmp_path):
    for name in ("cat/a.gif", "cat/b.gif", "bee/c.WEBP", "bee/notes.txt"):
        (folder / name).touch()
    (folder / "dog" / "pup").mkdir(parents=True)
    (folder / ".git" / "objects").mkdir(parents=True)
    (folder / ".old").mkdir()
    Image.new("RGB", (4, 4)).save(folder / ".old" / "1.png")
    expected = (
        f"{folder}: 3 images are left out, as only .jpg, .jpeg and .png are read: 2 .gif, 1 .webp",
        f"{folder}: 1 folder without images, so no class of that name: dog",
        f"{folder}: hidden folders are classes too: .old",
    )
    assert source(folder).warnings == expected
    assert split_data(folder, model=MODEL, wanted=WantedSplits(batch_size=2)).warnings == expected
    # Of two splits, what is said is of the one that is read.
    (tmp_path / "all").mkdir()
    folder.rename(tmp_path / "all" / "train")
    for name in ("ape", "bee"):
        (tmp_path / "all" / "val" / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "all" / "val" / name / "1.png")
    assert source(tmp_path / "all").warnings == ()


def test_images_beside_the_class_folders(folder):
    Image.new("RGB", (4, 4)).save(folder / "cover.png")
    with pytest.raises(FileError) as error:
        source(folder)
    assert str(error.value) == (
        f"{folder}: images lie beside the class folders, expected all in one of them: move them"
    )


def test_the_program_counts_and_names_what_it_left_out(run, folder):
    for number in range(4):
        (folder / "ape" / f"{number}.png").write_text("text")
    (folder / "ape" / "4.png").rename(folder / "ape" / "4\n\x1b[31m.png")
    (folder / "ape" / "4\n\x1b[31m.png").write_text("text")
    (folder / "dog").mkdir()
    small = ("--no-pretrained", "--num-classes", 3, "--img-size", 32, "--data", folder)
    outcome = run("profile", "test_resnet", *small, "--seed", 1)
    assert outcome.code == 0 and re.search(r"samples +13 in 2 batches", outcome.output)
    empty, left_out = outcome.error.splitlines()
    assert empty.endswith(": 1 folder without images, so no class of that name: dog")
    assert left_out.startswith("fastplastic: warning: 5 of 18 images cannot be read and are left")
    assert left_out.count(".png (no image)") == 3 and left_out.endswith(", ...")
    # Beside a plan the images are read for the loss.
    more = (*small, "-q", "--criterion", "random", "--ratio", "0.1", "-o", "plan.json")
    assert run("plan", "test_resnet", *more).code == 0
    outcome = run("reinit", "test_resnet", *small, "--plan", "plan.json", "--dry-run", "-q")
    assert outcome.code == 0 and outcome.error.count("5 of 18 images cannot be read") == 1
