"""The example's alerts fire when they should, and are silent when they should: Prometheus itself says so."""

import re
import subprocess
from pathlib import Path

from ftd.metrics import Metrics

RULES = Path(__file__).parents[2] / "configs/alerts.example.yml"
CASES = Path(__file__).with_name("alerts.yml")


def promtool(*words: str) -> str:
    done = subprocess.run(["promtool", *words], capture_output=True, text=True, timeout=100, check=False)
    told = done.stdout + done.stderr
    assert done.returncode == 0, told
    return told


def test_the_rules_are_rules() -> None:
    alerts = len(re.findall(r"- alert:", RULES.read_text()))
    assert f"SUCCESS: {alerts} rules found" in promtool("check", "rules", str(RULES))


def test_what_fires_and_what_must_not() -> None:
    assert "SUCCESS" in promtool("test", "rules", str(CASES))


def test_the_cases_are_made_of_series_that_exist() -> None:
    """A rule and its case could agree on a name that no daemon serves."""
    known = {each.name: each.labels for each in Metrics().descriptions()}
    series = re.findall(r"'(ftd_\w+)\{([^}]*)\}'", CASES.read_text())
    assert series
    for name, labels in series:
        for label, value in re.findall(r'(\w+)="([^"]*)"', labels):
            if label not in ("job", "instance", "pair"):
                assert value in known[name][label], f"{name}{{{labels}}}"
        assert name in known
