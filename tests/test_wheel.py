"""What `pip install` of the wheel gives: built from a copy, installed into a fresh folder."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

REPOSITORY = Path(__file__).parent.parent
# A model of timm that exists to be tested with.
TINY = ("test_resnet", "--no-pretrained", "--data", "sample", "--batches", "1", "-b", "2")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    copy = tmp_path_factory.mktemp("copy")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, copy)
    for name in ("fastplastic", "kernels", "cli"):
        shutil.copytree(
            REPOSITORY / name, copy / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", "."]
    result = subprocess.run(build, cwd=copy, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (built,) = (copy / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet"]
    subprocess.run([*install, "--target", folder, wheel], check=True)
    return folder


def run(site, tmp_path, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(site)}
    result = subprocess.run(
        [sys.executable, "-P", *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = ZipFile(wheel).namelist()
    folders = {name.partition("/")[0] for name in names}
    assert {folder for folder in folders if not folder.endswith(".dist-info")} == {"fastplastic"}
    packaged = {
        f"fastplastic/{inside}{file.relative_to(REPOSITORY / folder)}"
        for folder, inside in (("fastplastic", ""), ("kernels", "kernels/"), ("cli", "cli/"))
        for file in (REPOSITORY / folder).rglob("*")
        if file.suffix in {".py", ".npz", ".typed", ".LICENSE"}
    }
    assert {name for name in names if name.startswith("fastplastic/")} == packaged
    assert {
        "fastplastic/sources/sample.npz",
        "fastplastic/sources/sample.LICENSE",
        "fastplastic/py.typed",
    } <= packaged


def test_installed_wheel_is_what_runs(site, tmp_path):
    code = "import fastplastic, fastplastic.cli, fastplastic.kernels as k; print(k.__file__)"
    assert run(site, tmp_path, "-c", code).startswith(str(site))
    version = run(site, tmp_path, "-m", "fastplastic", "--version")
    assert version.split() == ["fastplastic", version.split()[1]]


def test_installed_wheel_profiles_a_model(site, tmp_path):
    output = run(site, tmp_path, "-m", "fastplastic", "profile", *TINY)
    assert "test_resnet" in output
    assert "weight layers measured" in output
