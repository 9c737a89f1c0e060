"""The floors: what an import drags in, and no cycles. `lint-imports` holds the layers."""

import graphlib
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[1]
SOURCES = [ROOT / folder for folder in ("jaxserve", "kernels", "schedulers")]

IMPORT_AND_REPORT = """
import importlib, json, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
loaded = {name: vars(module) for name, module in sys.modules.items()}
print(json.dumps({name: [it.get("__file__"), it.get("__doc__")] for name, it in loaded.items()}))
"""


@cache
def graph() -> grimp.ImportGraph:
    """Every import in the source, deferred and type-only ones too; nothing is run to find them."""
    return grimp.build_graph("jaxserve", cache_dir=None)


def importable() -> list[str]:
    """All modules but `__main__`, which runs, and the drivers of peers: these have a venv."""
    return sorted(
        name
        for name in graph().modules
        if not name.endswith(".__main__") and not name.startswith("jaxserve.bench.peers")
    )


def modules_after_importing(*names: str) -> dict[str, tuple[str | None, str | None]]:
    """Name -> (file, docstring) of all a fresh interpreter has loaded, with warnings as errors."""
    command = [sys.executable, "-W", "error", "-c", IMPORT_AND_REPORT, *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@cache
def everything_imported() -> dict[str, tuple[str | None, str | None]]:
    return modules_after_importing(*importable())


def test_import_jaxserve_loads_no_jax():
    assert not {"jax", "jaxlib", "flax"} & modules_after_importing("jaxserve").keys()


def test_schedulers_load_no_jax():
    names = [name for name in graph().modules if name.startswith("jaxserve.schedulers")]
    assert not {"jax", "jaxlib", "flax"} & modules_after_importing(*sorted(names)).keys()


def test_one_copy_of_each_module():
    loaded = everything_imported()
    assert not [name for name in loaded if name.split(".")[0] in ("kernels", "schedulers")]
    names_of: dict[Path, list[str]] = {}
    for name, (file, _) in loaded.items():
        path = Path(file or "/").resolve()
        if any(path.is_relative_to(source) for source in SOURCES):
            names_of.setdefault(path, []).append(name)
    assert len(names_of) >= len(importable())
    assert not [names for names in names_of.values() if len(names) > 1]


def test_every_module_says_what_it_knows():
    loaded = everything_imported()
    assert not [name for name in importable() if not (loaded[name][1] or "").strip()]


def test_no_module_imports_itself_through_others():
    imports = {m: graph().find_modules_directly_imported_by(m) for m in graph().modules}
    graphlib.TopologicalSorter(imports).prepare()  # raises CycleError, which names the cycle
