"""The list of metrics is an interface: these tests hold it, and what is built upon it."""

import json
import math
import re
from itertools import pairwise
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ftd import __version__, metrics
from ftd.metrics import Metrics
from ftd.state import PairState

REPOSITORY = Path(__file__).parents[2]

# Renaming or removing one breaks somebody's alert. Adding one is free: add it here as well.
EXPECTED = """
ftd_arbiter_answer_seconds histogram
ftd_arbiter_questions_total counter answer=granted|denied|silent|doubt
ftd_authority_standing gauge standing=empty|guarding|claiming|doubting|alone|paired|asking|unsure|deposed|ended
ftd_build_info gauge version,python
ftd_commit_latency_seconds histogram
ftd_disk_apply_lag_seconds gauge
ftd_disk_sync_progress_ratio gauge
ftd_disk_sync_sent_bytes_total counter
ftd_disk_sync_spared_bytes_total counter
ftd_disk_verified_bytes_total counter
ftd_disk_verify_differing_blocks_total counter
ftd_epoch_added_latency_seconds gauge
ftd_epoch_committed gauge
ftd_epoch_dirty_pages histogram
ftd_epoch_disk_requests histogram
ftd_epoch_frame_bytes histogram
ftd_epoch_journal_bytes histogram
ftd_epoch_length_configured_seconds gauge
ftd_epoch_length_seconds gauge
ftd_epoch_length_target_seconds gauge
ftd_epoch_slowdown_ratio gauge
ftd_epoch_stretch_ratio gauge
ftd_epochs_aborted_total counter reason=link|abandoned|invalid|stopped
ftd_epochs_begun_total counter
ftd_epochs_committed_total counter
ftd_epochs_stretched_total counter
ftd_epochs_verified_total counter
ftd_generation gauge
ftd_heartbeat_age_seconds gauge
ftd_heartbeat_path_losses_total counter path=link
ftd_heartbeat_path_up gauge path=link
ftd_heartbeats_missed_total counter
ftd_hot_pages gauge
ftd_in_flight_bytes gauge
ftd_in_flight_limit_bytes gauge
ftd_link_bytes_total counter connection=frames|control|heartbeat direction=sent|received
ftd_link_rejected_connections_total counter reason=garbage|tls|incompatible|refused|timeout
ftd_loop_lag_seconds gauge
ftd_output_held_bytes gauge
ftd_output_held_packets gauge
ftd_output_longest_hold_seconds gauge
ftd_output_pushed_back_total counter
ftd_output_release_latency_seconds histogram
ftd_pair_state gauge state=stopped|waiting|syncing|protected|solo|held|taken-over
ftd_pair_state_moves_total counter state=stopped|waiting|syncing|protected|solo|held|taken-over
ftd_pair_state_number gauge
ftd_pause_part_seconds histogram part=stop|drain|harvest|copy|device|digest|resume
ftd_pause_seconds histogram
ftd_resumption_last_seconds gauge
ftd_resumptions_total counter
ftd_role gauge role=primary|backup
ftd_speculative_active gauge
ftd_speculative_gain_pages gauge
ftd_speculative_pages_again_total counter
ftd_speculative_pages_total counter
ftd_speculative_rounds_total counter
ftd_sync_last_seconds gauge
ftd_sync_progress_ratio gauge
ftd_syncs_completed_total counter
ftd_takeover_seconds gauge phase=detection|activation|total
ftd_takeovers_refused_total counter
ftd_takeovers_total counter trigger=connection-reset|qemu-died|silence|switchover|forced|link-cut|restart-overdue
ftd_verify_differing_pages_total counter
ftd_warning gauge warning=accept_split_brain|insecure_link|output_not_held|disks_not_replicated|arbiter_unreachable|arbiter_stale|arbiter_not_told|path_down|other_peer
"""  # noqa: E501


def values(these: Metrics) -> dict[str, float]:
    """Every sample as Prometheus reads it: `name{label="value"}` → value."""
    found = {}
    for family in text_string_to_metric_families(these.render().decode()):
        for sample in family.samples:
            labels = ",".join(f'{key}="{value}"' for key, value in sample.labels.items())
            found[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
    return found


def test_the_whole_list() -> None:
    lines = []
    for each in Metrics().descriptions():
        if each.name == "ftd_build_info":
            labels = [",".join(each.labels)]
        else:
            labels = [f"{label}={'|'.join(allowed)}" for label, allowed in each.labels.items()]
        lines.append(" ".join([each.name, each.kind, *labels]))
    assert sorted(lines) == EXPECTED.strip().splitlines()


def test_what_is_described_is_what_is_served() -> None:
    these = Metrics()
    served = {
        (family.name + ("_total" if family.type == "counter" else ""), family.type)
        for family in text_string_to_metric_families(these.render().decode())
        if family.name.startswith("ftd_")
    }
    assert served == {(each.name, each.kind) for each in these.descriptions()}


def test_names_follow_the_rule() -> None:
    for each in Metrics().descriptions():
        assert re.fullmatch(r"ftd(_[a-z]+)+", each.name)
        assert each.name.endswith("_total") == (each.kind == "counter")
        assert not re.search(r"_(ms|us|ns|kib|mib|percent)(_|$)", each.name)
        assert each.text.endswith(".")
        assert "|" not in each.text, "would break the table of docs/metrics.md"


def test_every_series_exists_from_the_start() -> None:
    served = values(Metrics())
    for each in Metrics().descriptions():
        name = f"{each.name}_count" if each.kind == "histogram" else each.name
        series = [one for one in served if one.split("{")[0] == name]
        wanted = math.prod(len(allowed) for allowed in each.labels.values())
        assert len(series) == wanted, each.name


def test_buckets_grow_and_cover_what_is_measured() -> None:
    for buckets in (
        metrics.PAUSE_BUCKETS,
        metrics.PART_BUCKETS,
        metrics.PAGE_BUCKETS,
        metrics.FRAME_BUCKETS,
        metrics.COMMIT_BUCKETS,
        metrics.RELEASE_BUCKETS,
    ):
        assert list(buckets) == sorted(set(buckets))
    # a pause between 0.3 ms and 40 ms is known to a factor of two
    inside = [bound for bound in metrics.PAUSE_BUCKETS if 0.0003 <= bound <= 0.04]
    assert all(high / low <= 2 for low, high in pairwise(inside))


def test_two_daemons_in_one_process_do_not_share() -> None:
    one, other = Metrics(), Metrics()
    one.epochs_begun.inc()
    assert values(one)["ftd_epochs_begun_total"] == 1
    assert values(other)["ftd_epochs_begun_total"] == 0


def test_pause_and_its_parts() -> None:
    these = Metrics()
    these.observe_pause(1_500_000, {"stop": 30_000, "copy": 1_200_000})
    served = values(these)
    assert served["ftd_pause_seconds_sum"] == pytest.approx(0.0015)
    assert served['ftd_pause_seconds_bucket{le="0.0015"}'] == 1
    assert served['ftd_pause_seconds_bucket{le="0.001"}'] == 0
    assert served['ftd_pause_part_seconds_sum{part="copy"}'] == pytest.approx(0.0012)
    assert served['ftd_pause_part_seconds_count{part="digest"}'] == 0


def test_frames_and_link() -> None:
    these = Metrics()
    these.observe_frame(4096, 16_800_000)
    these.add_link_bytes("frames", sent=16_800_000, received=100)
    served = values(these)
    assert served["ftd_epoch_dirty_pages_sum"] == 4096
    assert served["ftd_epoch_frame_bytes_sum"] == 16_800_000
    assert served['ftd_link_bytes_total{connection="frames",direction="sent"}'] == 16_800_000
    assert served['ftd_link_bytes_total{connection="frames",direction="received"}'] == 100


def test_stretch_follows_from_the_lengths() -> None:
    these = Metrics()
    assert values(these)["ftd_epoch_stretch_ratio"] == 1
    these.set_epoch_length(0.05, 0.02)
    served = values(these)
    assert served["ftd_epoch_length_seconds"] == 0.05
    assert served["ftd_epoch_length_configured_seconds"] == 0.02
    assert served["ftd_epoch_stretch_ratio"] == pytest.approx(2.5)


@pytest.mark.parametrize("state", PairState)
def test_exactly_one_state_is_set(state: PairState) -> None:
    these = Metrics()
    these.set_state(PairState.HELD)
    these.set_state(state)
    served = values(these)
    assert {each: served[f'ftd_pair_state{{state="{each}"}}'] for each in PairState} == {
        each: float(each is state) for each in PairState
    }
    assert served["ftd_pair_state_number"] == state.number


def test_role_warnings_and_build() -> None:
    these = Metrics()
    these.set_role("backup")
    these.set_role("primary")
    these.set_warning("insecure_link", True)
    served = values(these)
    assert (served['ftd_role{role="primary"}'], served['ftd_role{role="backup"}']) == (1, 0)
    assert served['ftd_warning{warning="insecure_link"}'] == 1
    assert served['ftd_warning{warning="accept_split_brain"}'] == 0
    these.set_warning("insecure_link", False)
    assert values(these)['ftd_warning{warning="insecure_link"}'] == 0
    assert any(f'version="{__version__}"' in name for name in served)


def test_heartbeat_age_is_that_of_the_scrape() -> None:
    these = Metrics()
    assert math.isnan(values(these)["ftd_heartbeat_age_seconds"])
    ages: list[float | None] = [0.05, 7.5, None]
    these.set_heartbeat_age_source(lambda: ages.pop(0))
    assert values(these)["ftd_heartbeat_age_seconds"] == 0.05
    assert values(these)["ftd_heartbeat_age_seconds"] == 7.5
    assert math.isnan(values(these)["ftd_heartbeat_age_seconds"])


def test_takeover() -> None:
    these = Metrics()
    assert math.isnan(values(these)['ftd_takeover_seconds{phase="total"}'])
    these.count_takeover("silence", detection=0.3, activation=0.02, total=0.32)
    served = values(these)
    assert served['ftd_takeovers_total{trigger="silence"}'] == 1
    assert served['ftd_takeovers_total{trigger="qemu-died"}'] == 0
    assert served['ftd_takeover_seconds{phase="detection"}'] == 0.3
    assert served['ftd_takeover_seconds{phase="activation"}'] == 0.02
    assert served['ftd_takeover_seconds{phase="total"}'] == 0.32


# ---- what is built upon the list -----------------------------------------------------------------------


def series_names() -> set[str]:
    names = set()
    for each in Metrics().descriptions():
        suffixes = ("_bucket", "_sum", "_count") if each.kind == "histogram" else ("",)
        names.update(each.name + suffix for suffix in suffixes)
    return names


def test_the_page_is_up_to_date() -> None:
    page = (REPOSITORY / "docs/metrics.md").read_text()
    assert page == metrics.page(), "run: python -m ftd.metrics > docs/metrics.md"


@pytest.mark.parametrize("name", ["configs/alerts.example.yml", "configs/grafana-ftd.json"])
def test_configs_use_series_that_exist(name: str) -> None:
    text = (REPOSITORY / name).read_text()
    if name.endswith(".json"):
        expressions = [target["expr"] for panel in json.loads(text)["panels"] for target in panel["targets"]]
    else:
        expressions = re.findall(r"expr: (.*(?:\n {10}.*)*)", text)
    assert len(expressions) > 8
    used = {word for each in expressions for word in re.findall(r"\bftd_\w+", each)}
    assert used
    assert used <= series_names()


def test_configs_use_label_values_that_exist() -> None:
    text = (REPOSITORY / "configs/alerts.example.yml").read_text()
    for states in re.findall(r'state=~?"([^"]+)"', text):
        assert set(states.split("|")) <= {state.value for state in PairState}


def test_each_alert_has_its_runbook() -> None:
    alerts = (REPOSITORY / "configs/alerts.example.yml").read_text()
    book = (REPOSITORY / "docs/runbooks.md").read_text()
    names = re.findall(r"- alert: (\w+)", alerts)
    assert re.findall(r"runbook: docs/runbooks\.md#(\w+)", alerts) == [name.lower() for name in names]
    sections = re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", book, re.MULTILINE | re.DOTALL)
    assert [name for name, _ in sections] == names
    for name, text in sections:
        for part in ("**Meaning.**", "**Look at.**", "**Do.**"):
            assert part in text, name
    anchors = {name.lower() for name, _ in sections}
    assert set(re.findall(r"\]\(#(\w+)\)", book)) <= anchors
    assert set(re.findall(r"`(ftd_\w+)`", book)) <= {each.name for each in Metrics().descriptions()}
