"""What `pip install` gives: a wheel built from the sdist of a copy, and the editable install."""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
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
    # Without --wheel, the wheel is built from the sdist.
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", "."]
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
        if file.suffix in {".py", ".npz", ".json", ".typed", ".LICENSE", ".html", ".css", ".js"}
    }
    assert {name for name in names if name.startswith("fastplastic/")} == packaged
    assert {
        "fastplastic/sources/sample.npz",
        "fastplastic/sources/sample.LICENSE",
        "fastplastic/py.typed",
        "fastplastic/trials/evidence.json",
        "fastplastic/cli/page/layout.html",
        "fastplastic/cli/page/parts.html",
        "fastplastic/cli/page/profile.html",
        "fastplastic/cli/page/compare.html",
        "fastplastic/cli/page/page.css",
        "fastplastic/cli/page/page.js",
    } <= packaged


def test_installed_wheel_is_what_runs(site, tmp_path):
    code = "import fastplastic, fastplastic.cli, fastplastic.kernels as k; print(k.__file__)"
    assert run(site, tmp_path, "-c", code).startswith(str(site))
    version = run(site, tmp_path, "-m", "fastplastic", "--version")
    assert version.split() == ["fastplastic", version.split()[1]]


IMPORT_ALL = """
import importlib, pkgutil, fastplastic
names = [m.name for m in pkgutil.walk_packages(fastplastic.__path__, "fastplastic.")]
print(*(importlib.import_module(n).__file__ for n in names if n != "fastplastic.__main__"))
"""


def test_every_module_of_the_wheel_is_there(site, tmp_path):
    files = run(site, tmp_path, "-c", IMPORT_ALL).split()
    sources = [
        file
        for folder in ("fastplastic", "kernels", "cli")
        for file in (REPOSITORY / folder).rglob("*.py")
    ]
    # All but the package itself and __main__.
    assert len(files) == len(sources) - 2
    assert all(file.startswith(str(site)) for file in files)


def test_the_installed_package_is_complete():
    """In an editable install, packages that are not listed are found by nobody."""
    for folder, package in (("kernels", "fastplastic.kernels"), ("cli", "fastplastic.cli")):
        for file in (REPOSITORY / folder).rglob("*.py"):
            parts = [package, *file.relative_to(REPOSITORY / folder).with_suffix("").parts]
            assert find_spec(".".join(parts).removesuffix(".__init__")) is not None, file


def test_installed_wheel_profiles_a_model(site, tmp_path):
    output = run(site, tmp_path, "-m", "fastplastic", "profile", *TINY)
    assert "test_resnet" in output
    assert "weight layers measured" in output
