"""Files are written whole or not at all."""

import os
import signal
import stat
import subprocess
import sys

import pytest

from fastplastic.errors import FileError
from fastplastic.files import atomic_write, backup_of, keep_backup


def test_an_existing_file_stays_without_force(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(FileError) as error, atomic_write(path):
        raise AssertionError("not reached")
    assert str(error.value) == (
        f"{path}: exists already: choose another name, or replace it with --force"
    )
    path.chmod(0o604)
    with atomic_write(path, force=True) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o604
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_appears_meanwhile_stays(tmp_path):
    path = tmp_path / "a.json"
    with pytest.raises(FileError, match="exists already"), atomic_write(path) as temporary:
        temporary.write_text("ours")
        path.write_text("theirs")
    assert path.read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [path]


def test_of_two_programs_at_once_the_first_wins(tmp_path, monkeypatch):
    """The other file is there after the last look, a moment before ours gets its name."""
    path, link = tmp_path / "a.json", os.link

    def late(old, new):
        path.write_text("theirs")
        link(old, new)

    monkeypatch.setattr(os, "link", late)
    with pytest.raises(FileError, match="exists already"), atomic_write(path) as temporary:
        temporary.write_text("ours")
    assert path.read_text() == "theirs" and list(tmp_path.iterdir()) == [path]


def test_the_longest_name(tmp_path):
    with atomic_write(tmp_path / ("x" * 255)) as temporary:
        temporary.write_text("new")
    assert (tmp_path / ("x" * 255)).read_text() == "new"


def test_file_systems_without_second_names(tmp_path, monkeypatch):
    def none(old, new):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", none)
    with atomic_write(tmp_path / "a.json") as temporary:
        temporary.write_text("new")
    assert [(x.name, x.read_text()) for x in tmp_path.iterdir()] == [("a.json", "new")]


def test_writers_at_once_leave_one_whole_file(tmp_path):
    """With force the last one wins."""
    path = tmp_path / "a.json"
    with atomic_write(path, force=True) as first:
        first.write_text("first")
        with atomic_write(path, force=True) as second:
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]


def test_a_kept_file_is_complete_and_as_private_as_the_old_one(tmp_path):
    path, backup = tmp_path / "a.json", tmp_path / "a.json.bak"
    path.write_text("old")
    path.chmod(0o600)
    (tmp_path / "link").symlink_to("a.json")
    assert keep_backup(tmp_path / "link") == backup == backup_of(path)
    assert backup.read_text() == "old" and stat.S_IMODE(backup.stat().st_mode) == 0o600
    path.write_text("new")
    with pytest.raises(FileError, match=r"a\.json\.bak: exists already"):
        keep_backup(path)
    assert backup.read_text() == "old"
    keep_backup(path, force=True)
    assert backup.read_text() == "new"


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (KeyboardInterrupt, KeyboardInterrupt),
        (ValueError, ValueError),
        (OSError(28, "No space left on device"), FileError),
    ],
)
def test_a_failure_leaves_the_old_file(tmp_path, raised, expected):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(expected), atomic_write(path, force=True) as temporary:
        temporary.write_text("half")
        raise raised
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


KILLED = """
import os, signal, sys
from pathlib import Path
from fastplastic.files import atomic_write
os.fsync = {fsync}
with atomic_write(Path(sys.argv[1]), force=True) as temporary:
    temporary.write_text("half of the new file")
    {inside}
"""
KILL = "os.kill(os.getpid(), signal.SIGKILL)"


@pytest.mark.parametrize(
    ("fsync", "inside"),
    [("os.fsync", KILL), (f"lambda _: {KILL}", "pass")],
    ids=["while writing", "while syncing"],
)
def test_a_kill_leaves_the_old_file(tmp_path, fsync, inside):
    path = tmp_path / "a.json"
    path.write_text("old")
    program = KILLED.format(fsync=fsync, inside=inside)
    result = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert result.returncode == -signal.SIGKILL
    assert path.read_text() == "old"


@pytest.mark.parametrize(("force", "by"), [(True, "replace"), (False, "link")])
def test_file_and_folder_are_synced_around_the_rename(tmp_path, monkeypatch, force, by):
    path, done = tmp_path / "a.json", []
    fsync, rename = os.fsync, getattr(os, by)

    def spy_fsync(descriptor):
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        done.append(kind)
        fsync(descriptor)

    def spy_rename(old, new):
        done.append("rename")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, by, spy_rename)
    with atomic_write(path, force) as temporary:
        assert temporary.parent == tmp_path
        temporary.write_text("new")
    assert done == ["file", "rename", "folder"]


def test_a_link_is_followed(tmp_path):
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "link.json").symlink_to("real.json")
    with atomic_write(tmp_path / "link.json", force=True) as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "real.json").read_text() == "new"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("none/a.json", r"cannot be written \(No such file or directory\): choose another place"),
        ("file/a.json", r"cannot be written \(Not a directory\): choose another place"),
        ("folder", r": is a folder, expected the name of a file: choose another name"),
        ("pipe", r": is not a regular file, expected the name of a file"),
        ("x" * 300, r"cannot be written \(File name too long\)"),
    ],
)
def test_places_that_cannot_be_written(tmp_path, name, text):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(FileError, match=text), atomic_write(tmp_path / name, force=True):
        raise AssertionError("not reached")
    assert sorted(tmp_path.iterdir()) == before
