"""The protocol as a model: spin searches all of its runs, and finds each rule that is left out."""

import re
import subprocess
from pathlib import Path

import pytest

from ftd import authority

MODEL = Path(__file__).parents[1] / "model/authority.pml"
SMALL = ["-DEPOCHS=3", "-DLOSSES=1", "-DDROPS=1", "-DASKS=4"]
SAFETY = ["-DSAFETY", "-DNOCLAIM"]
LIVENESS = ["-DNOFAIR"]


def search(folder: Path, defines: list[str], how: list[str], *options: str, optimise: str = "-O0") -> str:
    """What the checker says of the model with these definitions. A search that was not whole is an error.

    Most searches are over sooner than an optimising compiler would be.
    """

    def run(*words: str) -> str:
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=100, check=False)
        return done.stdout + done.stderr

    (folder / "authority.pml").write_text(MODEL.read_text())
    run("spin", *defines, "-a", "-o3", "authority.pml")
    run("gcc", optimise, "-DCOLLAPSE", *how, *defines, "-o", "pan", "pan.c")
    told = run("./pan", "-m100000", "-w22", *options)
    assert re.search(r"errors: \d+", told), told
    assert "max search depth" not in told, told
    return told


def test_no_run_breaks_an_invariant_or_gets_stuck(tmp_path: Path) -> None:
    """At most one side releases output; no commit is lost by a takeover; no invalid end state."""
    told = search(tmp_path, [], SAFETY, optimise="-O2")
    assert "errors: 0" in told, told
    states = re.search(r"(\d+) states, stored", told)
    assert states is not None
    assert int(states[1]) > 100_000, "the search was too small to mean anything"


def test_output_flows_in_the_end_while_the_arbiter_and_one_host_live(tmp_path: Path) -> None:
    told = search(tmp_path, SMALL, LIVENESS, "-a", "-N", "speaks")
    assert "errors: 0" in told, told


@pytest.mark.parametrize(
    ("mutant", "finding"),
    [
        ("NO_CAS", r"b==6|b_owns"),  # two sides speak
        ("RELEASE_EARLY", r"released<=shadow"),  # what was seen is undone
        ("TAKE_UNACKED", r"torn.*shadow==acknowledged"),  # half a frame is started
        ("NO_PAIRING", r"b_owns"),  # a backup that nobody wrote down takes over
        ("NO_QUIET", r"torn|released<=shadow"),  # frames under way are lost when a daemon is replaced
        ("NO_HOLD", r"b==6|b_owns|released<=shadow"),  # a successor that nobody waited for lets output go
        ("NO_DOUBT", r"b_owns|released<=shadow"),  # protection begins while a question is out
    ],
)
def test_safety_needs_each_rule(tmp_path: Path, mutant: str, finding: str) -> None:
    told = search(tmp_path, [f"-D{mutant}"], SAFETY)
    violated = re.search(r"assertion violated (.*) \(at", told)
    assert violated is not None, told
    assert re.search(finding, violated[1]), violated[1]


def test_liveness_needs_the_question_to_be_repeated(tmp_path: Path) -> None:
    told = search(tmp_path, [*SMALL, "-DNO_RETRY"], LIVENESS, "-a", "-N", "speaks")
    assert "acceptance cycle" in told, told


def test_the_model_speaks_of_the_standings_of_the_code() -> None:
    names = re.search(r"mtype = \{ (EMPTY[^}]*) \}", MODEL.read_text())
    assert names is not None
    modelled = {name.strip().lower() for name in names[1].split(",")} - {"dead"}
    assert modelled == {standing.value for standing in authority.Standing} - {"ended"}
