"""pyproject.toml, requirements.lock, environment.yml, CITATION.cff and CHANGELOG.md say the same."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
DIRECT = [
    Requirement(line) for line in [*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra)]
]
LOCK = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if line and not line.startswith("#")]
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
EXACT = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[0-9][A-Za-z0-9.]*)")


def test_every_locked_version_is_exact_and_public():
    assert LOCK
    assert [line for line in LOCK if not EXACT.fullmatch(line)] == [], (
        "name==version alone: no range, link, path or tag"
    )


def test_cuda_packages_are_left_to_torch():
    assert [line for line in LOCK if line.startswith(("nvidia", "cuda", "triton"))] == []


def test_no_package_is_locked_twice():
    names = [canonicalize_name(EXACT.fullmatch(line)["name"]) for line in LOCK]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("direct", DIRECT, ids=str)
def test_every_direct_dependency_is_locked_at_a_version_that_fits(direct: Requirement):
    locked = _locked()
    assert canonicalize_name(direct.name) in locked, f"{direct.name} is missing from requirements.lock"
    assert direct.specifier.contains(locked[canonicalize_name(direct.name)], prereleases=True)


@pytest.mark.parametrize("pin", ["torch==2.13.0", "transformer-lens==3.9.0", "sae-lens==6.54.12"])
def test_the_three_that_decide_the_numbers_are_pinned(pin: str):
    assert pin in PROJECT["dependencies"]
    assert pin in LOCK


def test_every_direct_dependency_says_why_it_is_there():
    text = (ROOT / "pyproject.toml").read_text()
    for requirement in DIRECT:
        assert re.search(rf'^    "{re.escape(requirement.name)}[^"]*", +# \S+', text, re.MULTILINE), requirement.name


def test_conda_installs_the_lock_on_a_python_that_fits():
    python = next(entry for entry in CONDA if isinstance(entry, str) and entry.startswith("python="))
    fits = SpecifierSet(PROJECT["requires-python"])
    assert fits.contains(python.removeprefix("python=") + ".0")
    pip = next(entry["pip"] for entry in CONDA if isinstance(entry, dict))
    assert pip == ["-r requirements.lock", "-e ."]
    assert "pip" in CONDA


def test_citation_and_changelog_know_the_version():
    version = PROJECT["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == version
    assert citation["license"] == PROJECT["license"]
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert {version, "Unreleased"} & set(headings)


def _locked() -> dict[str, Version]:
    pairs = (EXACT.fullmatch(line) for line in LOCK)
    return {canonicalize_name(pair["name"]): Version(pair["version"]) for pair in pairs if pair}
