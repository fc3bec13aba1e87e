"""The package as it is installed: explicit package list, one copy of every module, files of a readable size."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_package_list_names_every_directory():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for top in ("pyrovae", "models", "guides")
        for path in (ROOT / top).rglob("__init__.py")
    }
    expected = {name if name.startswith("pyrovae") else f"pyrovae.{name}" for name in found}
    assert set(setup["packages"]) == expected
    assert set(setup["package-dir"]) == expected
    assert all((ROOT / folder / "__init__.py").exists() for folder in setup["package-dir"].values())


def test_models_and_guides_imported_from_the_root_are_the_same_package():
    code = (
        "from models import VAE; from models.vae import VAE as V2; from guides.laplace import Laplace\n"
        "import pyrovae.models, pyrovae.guides\n"
        "assert VAE is V2 is pyrovae.models.VAE; assert Laplace is pyrovae.guides.Laplace\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_first_import_is_light():
    code = (
        "import sys, pyrovae\n"
        "heavy = {'matplotlib', 'torchvision', 'arviz', 'sklearn', 'pandas', 'torch', 'pyro', 'pyrovae.models'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "import pyrovae.guides, pyrovae.training, pyrovae.reference, pyrovae.evidence, pyrovae.export\n"
        "heavy = {'matplotlib', 'torchvision', 'arviz', 'sklearn', 'pandas'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_no_file_is_long_and_every_ignore_has_a_reason():
    for top in ("pyrovae", "models", "guides"):
        for path in (ROOT / top).rglob("*.py"):
            lines = path.read_text().splitlines()
            assert len(lines) <= 500, f"{path.name} has {len(lines)} lines"
            for number, line in enumerate(lines, 1):
                if "type: ignore" in line:
                    assert line.count("#") >= 2, f"{path.name}:{number}: a type: ignore without a reason"


def test_the_dependency_rule():
    """models and guides import the engine's lower rooms only, and never each other."""
    upper = ("training", "cli", "reference", "diagnose", "comparison", "report", "plots", "export", "evidence")
    for top, other in (("models", "guides"), ("guides", "models")):
        for path in (ROOT / top).glob("*.py"):
            # What docstrings show is for users.
            text = "".join(line for line in path.read_text().splitlines(True) if not line.lstrip().startswith(">>>"))
            for name in (*upper, other):
                assert f"from pyrovae.{name}" not in text, f"{path.name} imports {name}"
                assert f"import pyrovae.{name}" not in text, f"{path.name} imports {name}"
