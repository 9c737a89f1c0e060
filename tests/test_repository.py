"""The repository as a newcomer finds it: pages are true, commands run, the wheel is whole."""

import os
import re
import subprocess
import tomllib
import zipfile
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path
from sys import stdlib_module_names

import grimp
import pytest
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import jaxserve

ROOT = Path(__file__).parents[1]
MAX_FILE_BYTES = 12 * 2**20
SOURCE_PATH = re.compile(r"`((?:jaxserve|kernels|schedulers|scripts|tests|docs)/[\w/.-]*)`")
COMMAND = re.compile(r"(?:^|[\s`(])((?:scripts|\.ci)/\w+)")
# Where whoever wrote a file had the checkout, a home or a file of their own.
HOMES = ("work", "root", r"home/\w+", r"Users/\w+")
MACHINE_PATH = re.compile(rf"(?<![\w.~/-])/(?:{'|'.join(HOMES)})(?![\w-])")


# What needs an extra. The peers' drivers run in a venv of their own, and answer for it themselves.
EXTRAS = {
    "jaxserve.models.training": "train",
    "jaxserve.bench.family_check": "bench",
    "jaxserve.bench.openai_check": "bench",
    "jaxserve.bench.openai_effects": "bench",
    "jaxserve.bench.openai_judging": "bench",
    "jaxserve.bench.peers": "peers",
}


@cache
def committed() -> list[Path]:
    """What git would commit: tracked files, and new ones that are not ignored. No links."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listing = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    paths = {ROOT / name for name in listing.split("\0") if name}
    return sorted(path for path in paths if path.is_file() and not path.is_symlink())


@cache
def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@cache
def declared(extra: str | None) -> set[str]:
    """The distributions that an install with this extra asks for, by canonical name."""
    project = pyproject()["project"]
    wanted = project["dependencies"] + (project["optional-dependencies"][extra] if extra else [])
    return {canonicalize_name(Requirement(it).name) for it in wanted}


def test_every_path_on_the_architecture_page_exists():
    named = SOURCE_PATH.findall((ROOT / "ARCHITECTURE.md").read_text())
    assert len(named) >= 20, "the page should follow a request file by file"
    assert not [path for path in named if not (ROOT / path).exists()]


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "ARCHITECTURE.md"])
def test_every_command_that_a_page_names_can_be_run(page: str):
    commands = set(COMMAND.findall((ROOT / page).read_text()))
    assert page != "README.md" or {"scripts/serve", "scripts/test"} <= commands
    assert not [it for it in sorted(commands) if not os.access(ROOT / it, os.X_OK)]


def test_every_relative_link_on_a_page_leads_somewhere():
    broken = []
    for page in (path for path in committed() if path.suffix == ".md"):
        for target in re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)", page.read_text()):
            if not (page.parent / target).exists():
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert not broken


def test_every_command_has_a_shebang_and_may_be_run():
    """A leading underscore marks what is sourced or imported, and must not be run."""
    for path in committed():
        if path.parent in (ROOT / "scripts", ROOT / ".ci"):
            is_command = not path.name.startswith("_")
            assert path.read_text().startswith("#!/usr/bin/env ") == is_command, path
            assert os.access(path, os.X_OK) == is_command, path


def test_every_python_command_is_linted_and_typed():
    """Neither ruff nor pyright takes a file without `.py` for Python unless it is named to them."""
    commands = {
        str(path.relative_to(ROOT))
        for path in committed()
        if path.parent == ROOT / "scripts" and "python" in path.read_text().split("\n", 1)[0]
    }
    tools = pyproject()["tool"]
    assert commands == set(tools["ruff"]["extend-include"])
    assert commands <= set(tools["pyright"]["include"])


def test_no_file_names_the_machine_it_was_written_on():
    found = []
    for path in committed():
        try:
            lines = path.read_text().splitlines()
        except UnicodeDecodeError:
            continue  # weights and pictures
        found += [
            f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}"
            for number, line in enumerate(lines, start=1)
            if MACHINE_PATH.search(line)
        ]
    assert not found


@pytest.mark.parametrize("text", ["{}/x", "`{}`", "cd {}", "cd {}/jaxserve", "={}/", "file:{}/x"])
def test_machine_paths_are_recognised(text: str):
    for home in ("work", "root", "home/ada", "Users/ada"):
        assert MACHINE_PATH.search(text.format(f"/{home}"))


@pytest.mark.parametrize("text", ["docs/work/x", "work/root", "/rooted", "~/work", "/v1/root-2"])
def test_other_paths_are_left_alone(text: str):
    assert not MACHINE_PATH.search(text)


def test_no_file_is_too_large_to_clone():
    assert not [path for path in committed() if path.stat().st_size > MAX_FILE_BYTES]


def test_changelog_opens_with_the_version():
    headings = re.findall(r"^## \[([^]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    newest = next(heading for heading in headings if heading != "Unreleased")
    assert newest == jaxserve.__version__


def test_licence_is_apache_2():
    text = " ".join((ROOT / "LICENSE").read_text().split())
    assert text.startswith("Apache License Version 2.0, January 2004")
    assert "9. Accepting Warranty or Additional Liability." in text
    assert pyproject()["project"]["license"] == "Apache-2.0"


def test_every_third_party_import_is_declared():
    """What another package happens to bring along here is missing in somebody's environment."""
    graph = grimp.build_graph("jaxserve", include_external_packages=True, cache_dir=None)
    owners = packages_distributions()
    missing = []
    for module in sorted(graph.modules):
        extra = next((EXTRAS[it] for it in EXTRAS if f"{module}.".startswith(f"{it}.")), None)
        if extra == "peers" or graph.is_module_squashed(module):
            continue
        for name in graph.find_modules_directly_imported_by(module):
            if graph.is_module_squashed(name) and name not in stdlib_module_names:
                if not declared(extra) & {canonicalize_name(it) for it in owners.get(name, [])}:
                    missing.append(f"{module} imports {name} ({owners.get(name, 'not installed')})")
    assert not missing


def test_wheel_holds_both_floors_and_all_data(tmp_path: Path):
    """The floors reach it through links; weights, schema and all else beside the code, too."""
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("jaxserve/")}
        others = {name.split("/", 1)[1] for name in archive.namelist()} - packed
    wanted = {str(path.relative_to(ROOT)) for path in committed()}
    wanted = {
        f"jaxserve/{it}" if it.startswith(("kernels/", "schedulers/")) else it for it in wanted
    }
    assert packed == {it for it in wanted if it.startswith("jaxserve/")}
    assert "licenses/LICENSE" in others
