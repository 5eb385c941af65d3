"""What users get: the sdist, the wheel that is built from it, its version, and shells that complete its commands."""

import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import onnxmerge

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUP = PROJECT["tool"]["setuptools"]
TAKEN = ("onnxmerge", "passes", "calibration", "tests", "docs", "examples", "LICENSE", "README.md", "CHANGELOG.md")
OTHERS = ("pyproject.toml", "MANIFEST.in", "Makefile", "constraints.txt")


def built(folder: Path, hook: str) -> Path:
    """What a hook of the build backend makes of the project in `folder`, without a network."""
    script = f"from setuptools import build_meta; print(build_meta.{hook}('dist'))"
    ran = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return folder / "dist" / ran.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the files that git has, so that what lies about does not count."""
    pytest.importorskip("setuptools", minversion="77")
    tree = tmp_path_factory.mktemp("tree")
    listed = subprocess.run(["git", "ls-files", *TAKEN, *OTHERS], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("no git here")
    for name in listed.stdout.splitlines():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes((ROOT / name).read_bytes())
    return built(tree, "build_sdist")


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist: what is missing there is missing here."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder)
    (unpacked,) = folder.iterdir()
    return built(unpacked, "build_wheel")


def source_of(package: str) -> Path:
    """The folder of a package."""
    for installed, folder in sorted(SETUP["package-dir"].items(), reverse=True):
        if package == installed or package.startswith(f"{installed}."):
            return ROOT / folder / package.removeprefix(installed).lstrip(".").replace(".", "/")
    raise AssertionError(package)


def test_the_packages_listed_are_those_that_exist() -> None:
    found = {
        f"{installed}.{'.'.join(file.parent.relative_to(ROOT / folder).parts)}".rstrip(".")
        for installed, folder in SETUP["package-dir"].items()
        for file in (ROOT / folder).rglob("*.py")
    }
    assert set(SETUP["packages"]) == found
    assert SETUP["packages"] == sorted(SETUP["packages"])


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    expected = {
        f"{package.replace('.', '/')}/{file.name}"
        for package in SETUP["packages"]
        for file in source_of(package).iterdir()
        if file.is_file() and file.suffix != ".pyc"
    }
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        about = Parser().parsestr(archive.read(f"onnxmerge-{onnxmerge.__version__}.dist-info/METADATA").decode())
    assert {"onnxmerge/py.typed", "onnxmerge/report/page.html.jinja", "onnxmerge/demo/digits.onnx"} <= expected
    assert names == expected
    assert about["Version"] == PROJECT["project"]["version"] == onnxmerge.__version__
    assert set(about.get_all("License-File") or ()) == set(PROJECT["project"]["license-files"])


@pytest.mark.slow
def test_the_sdist_holds_tests_and_documents(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    listed = subprocess.run(["git", "ls-files", *TAKEN, *OTHERS], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(listed.stdout.splitlines()) <= names


@pytest.mark.slow
def test_the_wheel_works_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "onnxmerge", *arguments]
        ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr
        return ran

    assert run("--version").stdout == f"onnxmerge {onnxmerge.__version__}\n"
    assert "AddFictive" in run("passes").stdout
    assert "conv" in run("inspect", str(tmp_path / "installed/onnxmerge/demo/digits.onnx")).stdout.lower()


@pytest.mark.slow
def test_shells_complete_commands_and_options() -> None:
    def completed(words: str) -> list[str]:
        environment = os.environ | {"_ONNXMERGE_COMPLETE": "complete_bash", "COMP_WORDS": words}
        environment |= {"COMP_CWORD": str(len(words.split(" ")) - 1)}
        command = [sys.executable, "-m", "onnxmerge"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()

    assert {"inspect", "pack", "zip", "run"} <= set(completed("onnxmerge "))
    assert completed("onnxmerge zip --shar") == ["--share", "--sharing"]
