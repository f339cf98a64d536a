"""The wheel: what it holds, and what an installer reads in it."""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CACHES = shutil.ignore_patterns("__pycache__")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the sources, so that nothing is left in the working tree."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("fxseek", "passes"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=CACHES)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    built = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = out.glob("*.whl")
    return path


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def read(wheel: Path, suffix: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(suffix))
        return archive.read(name).decode()


def test_every_module_is_in_the_wheel_and_nothing_else(wheel: Path) -> None:
    passes = (ROOT / "passes").rglob("*.py")
    sources = {f"fxseek/{path.relative_to(ROOT).as_posix()}" for path in passes}
    own = (path.relative_to(ROOT).as_posix() for path in (ROOT / "fxseek").rglob("*.py"))
    sources |= set(own)
    packaged = {name for name in names(wheel) if name.endswith(".py")}
    assert packaged == sources
    assert "fxseek/passes/__init__.py" in packaged
    assert "fxseek/passes/rules/__init__.py" in packaged


def test_the_only_top_level_package_is_fxseek(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in names(wheel)}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fxseek"}
    assert read(wheel, "top_level.txt").split() == ["fxseek"]


def test_it_tells_type_checkers_that_it_is_typed(wheel: Path) -> None:
    assert "fxseek/py.typed" in names(wheel)


def test_the_token_page_is_in_it(wheel: Path) -> None:
    assert "fxseek/reports/page.html" in names(wheel)


def test_it_declares_the_dynamo_backend(wheel: Path) -> None:
    entries = configparser.ConfigParser()
    entries.read_string(read(wheel, "entry_points.txt"))
    assert dict(entries["torch_dynamo_backends"]) == {
        "fxseek": "fxseek.capture.backend:fxseek_backend"
    }


def test_it_carries_its_licence_and_the_torch_versions_it_was_tried_on(wheel: Path) -> None:
    metadata = read(wheel, ".dist-info/METADATA")
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Dist: torch<2.15,>=2.11" in metadata
    assert any(name.endswith("licenses/LICENSE") for name in names(wheel))


def test_the_unpacked_wheel_can_be_imported(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = "import fxseek, fxseek.passes.rules as r; print(fxseek.__version__, r.__file__)"
    # Isolated, so that neither the working tree nor an editable install can stand in.
    start = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}"
    done = subprocess.run(
        [sys.executable, "-I", "-c", start], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    version, path = done.stdout.split()
    assert f"fxseek-{version}.dist-info/METADATA" in names(wheel)
    assert Path(path) == tmp_path / "fxseek" / "passes" / "rules" / "__init__.py"
