"""The other node: of the configuration, or as `ftd protect` chose, for as long as that holds."""

import json
import math

import pytest

from ftd import log
from ftd.config import Config
from ftd.errors import FtdError, HostError
from ftd.metrics import Metrics
from ftd.partner import Address, Partner
from ftd.report import Report


def config(tmp_path, peer="10.0.0.2"):
    return Config.model_validate(
        {
            "node": {"name": "a", "role": "primary", "state_dir": tmp_path},
            "link": {"listen": "10.0.0.1", "peer": peer, "peer_name": "web-b", "insecure": True},
            "arbiter": {"accept_split_brain": True},
        }
    )


def test_without_a_choice_it_is_that_of_the_configuration(tmp_path):
    partner = Partner(config(tmp_path))
    assert partner.address == Address("10.0.0.2", 7788, "web-b")
    assert partner.in_words() is None


def test_a_choice_outlives_the_daemon_and_says_where_it_is(tmp_path):
    told = Partner(config(tmp_path)).choose("10.0.0.3", None)
    assert str(tmp_path / "peer.json") in told
    partner = Partner(config(tmp_path))
    assert partner.address == Address("10.0.0.3", 7788, "10.0.0.3", chosen=True)
    assert "the peer is 10.0.0.3, as `ftd protect` chose" in (partner.in_words() or "")
    assert Partner(config(tmp_path)).choose("10.0.0.4", 7799)
    assert Partner(config(tmp_path)).address.port == 7799


def test_an_operator_who_changes_the_configuration_has_the_last_word(tmp_path):
    Partner(config(tmp_path)).choose("10.0.0.3", None)
    assert Partner(config(tmp_path, "10.0.0.5")).address == Address("10.0.0.5", 7788, "web-b")


def test_to_choose_the_configured_one_ends_the_choice(tmp_path):
    partner = Partner(config(tmp_path))
    partner.choose("10.0.0.3", None)
    assert partner.choose("10.0.0.2", 7788) == "as [link] peer says"
    assert not partner.address.chosen
    assert not (tmp_path / "peer.json").exists()
    assert partner.choose("10.0.0.2", 7799) != "as [link] peer says"


@pytest.mark.parametrize("text", ["", "[]", json.dumps({"host": "", "port": 1, "instead_of": "x"})])
def test_a_file_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "peer.json").write_text(text)
    with pytest.raises(HostError, match=r"peer.json: is no choice of `ftd protect`; remove it"):
        Partner(config(tmp_path))


def test_what_cannot_be_a_host_is_not_chosen(tmp_path):
    partner = Partner(config(tmp_path))
    with pytest.raises(
        FtdError, match=r"^10\.0\.0\.\.3: is neither an address nor a name of a host, such as"
    ):
        partner.choose("10.0.0..3", None)
    assert not partner.address.chosen
    assert not partner.path.exists()


def test_a_choice_of_an_earlier_version_that_cannot_be_a_host_is_none(tmp_path, caplog):
    chosen = {"host": "10.0.0..3", "port": 7788, "instead_of": "10.0.0.2"}
    (tmp_path / "peer.json").write_text(json.dumps(chosen))
    partner = Partner(config(tmp_path))
    assert partner.address == Address("10.0.0.2", 7788, "web-b")
    assert partner.in_words() is None
    [line] = caplog.records
    assert line.levelname == "WARNING"
    assert "10.0.0..3" in log.Formatter(journal=False, tracebacks=False).format(line)


def test_a_choice_that_cannot_be_kept_is_none(tmp_path):
    partner = Partner(config(tmp_path))
    (tmp_path / "peer.json.new").mkdir()
    with pytest.raises(HostError):
        partner.choose("10.0.0.3", None)
    assert not partner.address.chosen


def test_paths_lead_to_the_configured_peer_only(tmp_path):
    own = config(tmp_path)
    path = {"name": "side", "listen": "10.1.0.1", "peer": "10.1.0.2"}
    own = Config.model_validate(own.model_dump() | {"heartbeat": {"path": [path]}})
    report = Report(own, Metrics(), "primary")

    def side():
        return report.metrics.path_up.labels(path="side")._value.get()

    assert side() == 0
    assert [each.name for each in report.status().peer.paths] == ["link", "side"]
    report.set_peer_address("10.0.0.3", "the peer is another")
    assert math.isnan(side())
    assert [(each.name, each.address) for each in report.status().peer.paths] == [("link", "10.0.0.3")]
    assert report.status().warnings == ["the peer is another"]
    report.session_ended()
    assert math.isnan(side())
    report.set_peer_address("10.0.0.2", None)
    assert side() == 0
    assert report.status().warnings == []
