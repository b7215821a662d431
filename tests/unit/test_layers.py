"""Imports between the modules of ftd: no circles, also none within functions or under TYPE_CHECKING."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in ROOT.glob("ftd/**/*.py")
}


def imported(path: Path) -> set[str]:
    """The package's modules that a file imports, wherever in it that stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            named = {f"{node.module}.{alias.name}" for alias in node.names} & FILES.keys()
            # `from ftd import log` needs ftd/log.py, and of ftd itself what has no file of its own.
            found |= named
            if len(named) < len(node.names):
                found.add(str(node.module))
    return found & FILES.keys()


def test_no_module_imports_one_that_imports_it() -> None:
    graph = {name: imported(path) for name, path in FILES.items()}
    assert graph["ftd.link.session"] >= {"ftd.channel", "ftd.log"}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("package", ["ftd.backup", "ftd.link", "ftd.protection"])
def test_a_package_is_entered_by_its_face(package: str) -> None:
    for name, path in FILES.items():
        if name != package and not name.startswith(f"{package}."):
            inner = {each for each in imported(path) if each.startswith(f"{package}.")}
            assert inner == set(), f"{path} imports {inner}"
