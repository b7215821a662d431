"""The documents: what they name exists, and what exists is named."""

import argparse
import re
import typing
from pathlib import Path

import pytest

from ftd import config, errors
from ftd.cli.entry import parser as parser_of_all
from ftd.metrics import Metrics
from ftd.state import PairState

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    *sorted(ROOT.glob("docs/*.md")),
    ROOT / "qemu/README.md",
    ROOT / "guests/README.md",
]
CONFIGURE = ROOT / "docs/configure.md"
# What Prometheus's client adds to the name of a counter, a histogram or a gauge.
SUFFIXES = ("", "_total", "_bucket", "_sum", "_count", "_created")


def pages(*, but: tuple[str, ...] = ()) -> list[typing.Any]:
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES if page.name not in but]


def prose(page: Path) -> str:
    """Text without what stands in fenced blocks, where a # is no heading."""
    return re.sub(r"(?ms)^```.*?^```$", "", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for line in re.findall(r"(?m)^#{1,6} +(.*)$", prose(page)):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", line).strip().lower()
        found.add(re.sub(r"[^\w\- ]", "", text).replace(" ", "-"))
    return found


def links(page: Path) -> list[str]:
    text = re.sub(r"`[^`\n]*`", "", prose(page))
    return re.findall(r"\]\(([^)\s]+)\)", text)


# ---- links ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", pages())
def test_relative_links_lead_somewhere(page):
    broken = []
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken, f"{page.relative_to(ROOT)}: these lead nowhere: {broken}"


def test_every_page_is_reached_from_the_readme():
    reached, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        if page in reached:
            continue
        reached.add(page)
        for link in links(page):
            target = (page.parent / link.partition("#")[0]).resolve()
            if target.suffix == ".md" and target.exists():
                todo.append(target)
    assert {page for page in PAGES if page not in reached} == set()


@pytest.mark.parametrize("page", pages())
def test_files_of_the_repository_that_are_named_exist(page):
    pattern = r"`((?:scripts|configs|systemd|tests|guests|bench|docs|ftd|qemu)/[\w@./-]*[\w/])`"
    named = re.findall(pattern, page.read_text(encoding="utf-8"))
    elsewhere = {"scripts/checkpatch.pl"}  # in QEMU's tree
    # Words in capitals stand for a name.
    missing = [name for name in named if not (ROOT / name).exists() and not re.search(r"[A-Z]{4}", name)]
    assert set(missing) <= elsewhere


# ---- configuration ----------------------------------------------------------------------------------------


def sections() -> dict[str, typing.Any]:
    """Every section of the configuration, by its heading on the page."""
    found = {}
    for name, field in config.Config.model_fields.items():
        model = typing.cast(typing.Any, field.annotation)
        found[f"[{name}]"] = model
        for key, entry in model.model_fields.items():
            inner = typing.get_args(entry.annotation)
            if inner and hasattr(inner[0], "model_fields"):
                found[f"[[{name}.{key}]]"] = inner[0]
    return found


def rows(heading: str) -> dict[str, tuple[str, str, str]]:
    """Default, values and meaning in the table below a heading, by key."""
    parts = re.split(r"(?m)^#+ (.*)$", CONFIGURE.read_text(encoding="utf-8"))
    text = dict(zip(parts[1::2], parts[2::2], strict=True)).get(heading, "")
    cells = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in re.findall(r"(?m)^\|.*\|$", text)
        if line.startswith("| `")
    ]
    return {row[0].strip("| `"): (row[1], row[2], row[3]) for row in cells}


@pytest.mark.parametrize("heading", sections())
def test_the_page_has_every_key_of_a_section_and_no_other(heading):
    assert list(rows(heading)) == list(sections()[heading].model_fields)


@pytest.mark.parametrize("heading", sections())
def test_defaults_and_ranges_on_the_page_are_those_of_the_code(heading):
    for key, entry in sections()[heading].model_fields.items():
        default, values, meaning = rows(heading)[key]
        if entry.is_required():
            assert default == "**required**", key
        elif isinstance(entry.default, bool | int):
            assert default == f"`{str(entry.default).lower()}`", key
        elif isinstance(entry.default, str | Path) and str(entry.default):
            assert default == f'`"{entry.default}"`', key
        else:
            assert default == "–", key
        bounds = [getattr(rule, name, None) for name in ("ge", "le") for rule in entry.metadata]
        for bound in bounds:
            if bound is not None:
                assert str(bound) in values, key
        assert len(meaning) > 20, f"{key}: say what it means and costs"


def test_the_readmes_example_is_a_configuration(tmp_path):
    text = re.findall(r"(?ms)^```toml\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert text
    for number, example in enumerate(text):
        file = tmp_path / f"{number}.toml"
        file.write_text(example)
        assert config.load(file).node.name == "web-a"


@pytest.mark.parametrize("page", pages())
def test_keys_that_are_named_with_their_section_exist(page):
    known = {
        f"[{name}] {key}"
        for name, field in config.Config.model_fields.items()
        for key in typing.cast(typing.Any, field.annotation).model_fields
    }
    named = re.findall(r"`(\[[a-z]+\]) ([a-z_]+)\b", page.read_text(encoding="utf-8"))
    assert {f"{section} {key}" for section, key in named} - known == set()


# ---- metrics, commands, states ----------------------------------------------------------------------------


@pytest.mark.parametrize("page", pages(but=("metrics.md",)))
def test_metrics_that_are_named_exist(page):
    families = {family.name for family in Metrics().registry.collect()}
    known = {name + suffix for name in families for suffix in SUFFIXES}
    named = set(re.findall(r"\bftd_[a-z][a-z_]*[a-z]\b", page.read_text(encoding="utf-8")))
    assert named - known == set()


def commands() -> dict[str, argparse.ArgumentParser]:
    parser = parser_of_all()
    action = next(each for each in parser._actions if isinstance(each, argparse._SubParsersAction))
    return dict(action.choices)


@pytest.mark.parametrize("command", commands())
def test_every_command_and_its_options_are_explained_to_operators(command):
    text = (ROOT / "docs/operate.md").read_text(encoding="utf-8")
    assert f"| `ftd {command}" in text
    for action in commands()[command]._actions:
        for option in action.option_strings:
            if option.startswith("--") and option not in ("--help", "--debug"):
                assert option in text, f"ftd {command} {option}"


@pytest.mark.parametrize("page", pages())
def test_commands_that_are_named_exist(page):
    named = set(re.findall(r"(?:^    |`)ftd ([a-z-]+)\b", page.read_text(encoding="utf-8"), re.MULTILINE))
    assert named - set(commands()) == set()


def test_every_state_is_explained_to_operators():
    text = (ROOT / "docs/operate.md").read_text(encoding="utf-8")
    assert [state.value for state in PairState if f"| `{state.value}` |" not in text] == []


def test_every_alert_has_its_runbook():
    alerts = re.findall(r"- alert: (\w+)", (ROOT / "configs/alerts.example.yml").read_text(encoding="utf-8"))
    assert alerts
    assert {name.lower() for name in alerts} <= anchors(ROOT / "docs/runbooks.md")


# ---- exit codes, units, modules ---------------------------------------------------------------------------


def exit_codes() -> set[int]:
    classes = [each for each in vars(errors).values() if isinstance(each, type)]
    return {each.exit_code for each in classes if issubclass(each, errors.FtdError)}


def test_every_exit_code_is_explained_and_whether_the_units_start_the_daemon_again():
    text = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    table = {int(code): again for code, again in re.findall(r"(?m)^\| (\d+) \| .* \| (\w+)[^|]* \|$", text)}
    assert exit_codes() <= set(table)
    for role in ("primary", "backup"):
        unit = (ROOT / f"systemd/ftd-{role}@.service").read_text(encoding="utf-8")
        never = re.search(r"(?m)^RestartPreventExitStatus=(.*)$", unit)
        assert never
        assert {code for code, again in table.items() if again == "no"} - {0} == set(
            map(int, never[1].split())
        )


def test_every_module_is_named_in_the_architecture():
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    tree = text.partition("## Modules")[2].partition("\n## ")[0]
    files = [path for path in ROOT.glob("ftd/**/*.py") if path.parent.name != "config"]
    modules = {path.stem for path in files} - {"__init__", "__main__"}
    assert modules - set(re.findall(r"\w+", tree)) == set()


# ---- what must not be in a document -----------------------------------------------------------------------


@pytest.mark.parametrize("page", pages())
def test_no_unfinished_places(page):
    assert re.findall(r"@@\w+@@|TODO|FIXME|XXX", page.read_text(encoding="utf-8")) == []
