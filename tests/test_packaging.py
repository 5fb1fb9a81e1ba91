"""What is handed on: wheel, sdist, container, site."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = shutil.ignore_patterns(".git", ".venv*", "__pycache__", ".*_cache", "*.egg-info")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    found = subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An sdist of this tree, and a wheel made of the unpacked sdist, so that nothing comes from the clone."""
    folder = tmp_path_factory.mktemp("built")
    shutil.copytree(ROOT, folder / "clone", ignore=LEFT_OUT)
    backend = "from setuptools import build_meta; build_meta.build_{}('..')"
    run("-c", backend.format("sdist"), cwd=folder / "clone")
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as file:
        file.extractall(folder, filter="data")
    run("-c", backend.format("wheel"), cwd=folder / sdist.name.removesuffix(".tar.gz"))
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


@pytest.mark.slow
def test_the_wheel_holds_all_of_the_package(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as wheel:
        names = {name for name in wheel.namelist() if name.startswith("prefopt/")}
    here = [p for p in (ROOT / "src/prefopt").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert names == {p.relative_to(ROOT / "src").as_posix() for p in here}


@pytest.mark.slow
def test_the_sdist_holds_what_readme_and_docs_name(built: tuple[Path, Path]) -> None:
    from test_docs import pages

    with tarfile.open(built[0]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"Makefile", "constraints.txt", "examples/flat_dpo.py", "tests/conftest.py", "Dockerfile"} <= names
    assert {p.relative_to(ROOT).as_posix() for p in pages(ROOT)} <= names


@pytest.mark.slow
def test_the_wheel_runs_outside_of_a_clone(built: tuple[Path, Path], tmp_path: Path) -> None:
    with zipfile.ZipFile(built[1]) as wheel:
        wheel.extractall(tmp_path / "installed")
    elsewhere = {"PYTHONPATH": str(tmp_path / "installed"), "PYTHONSAFEPATH": "1"}
    place = run("-c", "import prefopt; print(prefopt.__file__)", cwd=tmp_path, **elsewhere)
    assert place.startswith(str(tmp_path))
    told = run(
        "-m",
        "prefopt",
        *("sample", "--model", "prefopt:demo/tiny_imdb", "--prompts", "prefopt:demo/openings.txt"),
        *("--num", "1", "--max-new-tokens", "2", "--output", "out.jsonl"),
        cwd=tmp_path,
        **elsewhere,
    )
    assert "out.jsonl" in told and (tmp_path / "out.jsonl").read_text().count("\n") > 100
    options = run(
        "-m",
        "prefopt",
        "methods",
        "--config",
        "prefopt:recipes/methods.yaml",
        "--print-config",
        cwd=tmp_path,
        **elsewhere,
    )
    assert "model: prefopt:demo/tiny_imdb" in options


def test_the_version_of_the_citation_is_that_of_the_package() -> None:
    import yaml

    import prefopt

    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (cited["version"], cited["license"]) == (prefopt.__version__, "Apache-2.0")


def test_the_container_copies_what_the_package_is_built_of() -> None:
    """Where no container can be built: every file that a COPY names exists, and the package needs no other."""
    copied = [
        word
        for line in (ROOT / "Dockerfile").read_text().splitlines()
        if line.startswith("COPY")
        for word in line.split()[1:-1]
    ]
    assert all((ROOT / word).exists() for word in copied)
    assert {"pyproject.toml", "README.md", "LICENSE", "src", "constraints.txt"} <= set(copied)
