"""Configuration: what is accepted, and the sentence that answers each mistake."""

import re
import tomllib
from pathlib import Path

import pytest
from unit import sample

from ftd.config import Config, Disk, Nic, check_files, load
from ftd.config.fields import a_host
from ftd.errors import ConfigError

EXAMPLES = Path(__file__).parents[2] / "configs"

MINIMAL = sample.text()


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "a.toml"
        path.write_text(text)
        return path

    return write


def problems(path: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(caught.value).splitlines() == list(caught.value.problems)
    assert caught.value.exit_code == 2
    return [problem.removeprefix(f"{path}: ") for problem in caught.value.problems]


def changed(old: str, new: str) -> str:
    assert old in MINIMAL
    return MINIMAL.replace(old, new)


# ---- what is accepted -------------------------------------------------------------------------------------


def test_minimal_file_gives_the_documented_defaults(write):
    config = load(write(MINIMAL))
    assert config.node.state_folder == Path("/var/lib/ftd/a")
    assert config.node.run_folder == Path("/run/ftd/a")
    assert (config.link.port, config.link.heartbeat_port, config.http.port) == (7788, 7789, 9105)
    assert config.link.expected_peer_name == "10.0.0.2"
    assert config.heartbeat.detection_seconds == pytest.approx(0.3)
    assert config.machine.memory_bytes == 256 * 1024 * 1024
    assert config.machine.nic == ()


@pytest.mark.parametrize("role", ["primary", "backup"])
def test_examples_load(role):
    assert load(EXAMPLES / f"{role}.example.toml").node.role == role


@pytest.mark.parametrize("role", ["primary", "backup"])
def test_examples_name_every_key(role, write):
    text = (EXAMPLES / f"{role}.example.toml").read_text()
    # A key that is commented out follows the `#` directly; prose has a blank there.
    uncommented = re.sub(r"(?m)^#(?=\w|\[\[)", "", text)
    load(write(uncommented))
    data = tomllib.loads(uncommented)
    for name, section in Config.model_fields.items():
        keys = set(section.annotation.model_fields)
        if role == "backup":
            keys.discard("attach")
        if name == "arbiter":
            # The kinds exclude each other; the others stay in comments with a blank.
            told = set(re.findall(r"(?m)^# +([a-z_]+) = ", text)) | data[name].keys()
            assert keys <= told
            continue
        assert keys == data[name].keys(), name
    assert Nic.model_fields.keys() == data["machine"]["nic"][0].keys()
    assert Disk.model_fields.keys() == data["machine"]["disk"][0].keys()


@pytest.mark.parametrize(
    "section", [*(field.annotation for field in Config.model_fields.values()), Nic, Disk]
)
def test_every_key_is_described_with_its_default(section):
    assert section.__doc__
    for name, field in section.model_fields.items():
        told = "Required" if field.is_required() else "Default: |Needed unless"
        assert re.search(told, field.description or ""), name


def test_relative_paths_start_at_the_folder_of_the_file(write, tmp_path):
    config = load(write(MINIMAL + '[machine]\nkernel = "boot/vmlinuz"\nmemory_path = "/dev/shm"\n'))
    assert config.machine.kernel == tmp_path / "boot/vmlinuz"
    assert config.machine.memory_path == Path("/dev/shm")


def test_network_cards(write):
    config = load(
        write(
            MINIMAL
            + '[[machine.nic]]\ntap="tap0"\nmac="52:54:00:00:00:01"\n'
            + '[[machine.nic]]\ntap="tap1"\nmac="52:54:00:00:00:02"\n'
        )
    )
    assert [nic.tap for nic in config.machine.nic] == ["tap0", "tap1"]


def test_heartbeat_paths(write):
    text = '[[heartbeat.path]]\nname="a"\nlisten="10.1.0.1"\npeer="10.1.0.2"\n'
    config = load(write(MINIMAL + text + '[[heartbeat.path]]\nname="b"\nlisten="h1"\npeer="h2"\n'))
    assert [path.name for path in config.heartbeat.path] == ["a", "b"]
    assert config.heartbeat.link_patience_ms == 2000


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ('name="link"\nlisten="10.1.0.1"\npeer="10.1.0.2"', 'number 1, name = "link": is the name of the'),
        ('name="A B"\nlisten="10.1.0.1"\npeer="10.1.0.2"', 'number 1, name = "A B": is not well-formed'),
        ('name="a"\nlisten="10.1.0.1"', "number 1, peer: is missing"),
        ('name="a"\nlisten="10.1.0.1"\npeer="10.1.0.1"', "peer = .*: is this node's own address"),
        ('name="a"\nlisten="10.1.0.1"\npeer="10.0.0.2"', r"peer = .*: is also \[link\] peer, on which"),
        ('name="a"\nlisten="10.0.0.1"\npeer="10.1.0.2"', r"listen = .*: is also \[link\] listen, on which"),
        (
            'name="a"\nlisten="fd00::1"\npeer="fd00::2"\n'
            '[[heartbeat.path]]\nname="b"\nlisten="fd00:0::1"\npeer="fd00::3"',
            'number 2, listen = "fd00:0::1": is that of number 1, too',
        ),
        (
            'name="a"\nlisten="h1"\npeer="h2"\n[[heartbeat.path]]\nname="a"\nlisten="h3"\npeer="h4"',
            'number 2, name = "a": is that of number 1, too',
        ),
    ],
)
def test_heartbeat_paths_that_are_none(write, path, words):
    with pytest.raises(ConfigError, match=r"\[\[heartbeat.path\]\] .*" + words):
        load(write(MINIMAL + "[[heartbeat.path]]\n" + path + "\n"))


def test_paths_cannot_be_told_apart_by_a_link_that_listens_everywhere(write):
    text = MINIMAL.replace('listen = "10.0.0.1"', 'listen = "0.0.0.0"')
    path = '[[heartbeat.path]]\nname="a"\nlisten="10.1.0.1"\npeer="10.1.0.2"\n'
    with pytest.raises(ConfigError, match=r"\[link\] listen = \"0.0.0.0\": is every address of this host"):
        load(write(text + path))


def test_disks(write, tmp_path):
    config = load(
        write(
            MINIMAL
            + '[[machine.disk]]\npath="a.raw"\n[[machine.disk]]\npath="/dev/vg/b"\ncache="writeback"\n'
        )
    )
    assert [disk.path for disk in config.machine.disk] == [tmp_path / "a.raw", Path("/dev/vg/b")]
    assert [disk.cache for disk in config.machine.disk] == ["none", "writeback"]
    with pytest.raises(ConfigError, match=r"\[\[machine.disk\]\] number 1, path = \".*a.raw\": no such file"):
        check_files(config)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            '[[machine.disk]]\npath="a"\n[[machine.disk]]\npath="a"\n',
            r"number 2, path = \"a\": is that of number 1, too",
        ),
        (
            '[[machine.disk]]\npath="a"\nmodel="ide-hd"\niothread=true\n',
            "number 1, iothread = true: is for virtio disks",
        ),
        (
            "[[machine.disk]]\ncache='none'\n",
            r"\[\[machine.disk\]\] number 1, path: is missing; it is: raw image",
        ),
        (
            "[[machine.disk]]\npath='a'\ncache='unsafe'\n",
            'number 1, cache = "unsafe": is not one of the possible',
        ),
        ("[disks]\njournal_mib=0\n", "journal_mib = 0: is out of range; give a whole number from 1 to 256"),
    ],
)
def test_disks_that_cannot_be(write, text, words):
    with pytest.raises(ConfigError, match=words):
        load(write(MINIMAL + text))


# ---- files that cannot be read ----------------------------------------------------------------------------


def test_missing_file(tmp_path):
    with pytest.raises(
        ConfigError, match=r"none\.toml: no such file or directory; create it, or correct the path"
    ):
        load(tmp_path / "none.toml")


def test_folder_in_place_of_a_file(tmp_path):
    with pytest.raises(ConfigError, match="is a directory"):
        load(tmp_path)


def test_not_text(tmp_path):
    path = tmp_path / "a.toml"
    path.write_bytes(b"[node]\nname = '\xff'\n")
    assert problems(path) == ["is not UTF-8 text (byte 15); save it as UTF-8"]


def test_syntax_error_names_the_line(write):
    [problem] = problems(write("[node]\nname = web\n"))
    assert problem.startswith("line 2, column 8: Invalid value")
    assert "`name = web`" in problem


def test_syntax_error_at_the_end_of_the_file(write):
    [problem] = problems(write('[node]\nname = """web'))
    assert problem.startswith("line 2 (end of file)")


# ---- one mistake, one sentence ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            MINIMAL + "[epoch]\nlenght_ms = 20\n",
            "[epoch] lenght_ms = 20: unknown key; did you mean length_ms?",
        ),
        (MINIMAL + "[epochs]\nlength_ms = 20\n", "epochs = {…}: unknown section; did you mean epoch?"),
        (
            MINIMAL + "[http]\nzzz = 1\n",
            "[http] zzz = 1: unknown key; known here: listen, port",
        ),
        (
            MINIMAL + "[epoch]\nlength_ms = 4\n",
            "[epoch] length_ms = 4: is out of range; give a whole number from 5 to 10000",
        ),
        (
            MINIMAL + "[epoch]\nverify_every = -1\n",
            "[epoch] verify_every = -1: is out of range; give a whole number from 0 up",
        ),
        (
            MINIMAL + '[epoch]\ntracker = "ring"\n[machine]\naccelerator = "tcg"\n',
            '[epoch] tracker = "ring": is for kvm, and [machine] accelerator is "tcg"; '
            'give "auto", or remove it',
        ),
        (
            MINIMAL + '[epoch]\ntracker = "bitmap"\n',
            '[epoch] tracker = "bitmap": needs KVM\'s dirty bitmap; '
            "set [machine] dirty_ring_size = 0 as well",
        ),
        (
            MINIMAL + '[epoch]\ntracker = "ring"\n[machine]\ndirty_ring_size = 0\n',
            '[epoch] tracker = "ring": needs KVM\'s dirty rings, and [machine] dirty_ring_size is 0; '
            "give 65536 there, or remove it",
        ),
        (
            MINIMAL + '[epoch]\ntracker = "ring-stock"\nhot_epochs = 3\n',
            '[epoch] hot_epochs = 3: is for the tracker ring; give 0, or [epoch] tracker = "ring" and '
            "[machine] dirty_ring_size",
        ),
        (
            MINIMAL + "[epoch]\nhot_epochs = 256\n",
            "[epoch] hot_epochs = 256: is out of range; give a whole number from 0 to 255",
        ),
        (
            MINIMAL + '[http]\nport = "9105"\n',
            '[http] port = "9105": is a string; write a whole number',
        ),
        (MINIMAL + "[http]\nport = true\n", "[http] port = true: is true or false; write a whole number"),
        (
            MINIMAL + "[epoch]\nlength_ms = 7.5\n",
            "[epoch] length_ms = 7.5: is a number with a fraction; write a whole number",
        ),
        (
            MINIMAL + "[machine]\nkernel = 1\n",
            "[machine] kernel = 1: is a whole number; write a path in quotes",
        ),
        (
            MINIMAL + '[machine]\narguments = "-S"\n',
            '[machine] arguments = "-S": is a string; write a list of strings: ["…", "…"]',
        ),
        (
            MINIMAL + "[machine]\narguments = [1]\n",
            "[machine] arguments[0] = 1: is a whole number; write a string in quotes",
        ),
        ("http = 1\n" + MINIMAL, "[http] = 1: is a whole number; write a section: [http]"),
        (
            changed('role = "primary"', 'role = "master"'),
            """[node] role = "master": is not one of the possible values; choose 'primary' or 'backup'""",
        ),
        (
            changed('name = "a"', 'name = "Web 1"'),
            '[node] name = "Web 1": is not well-formed; it is: name of this node: '
            "lower-case letters, digits and dashes, at most 32",
        ),
        (
            changed('name = "a"', ""),
            "[node] name: is missing; it is: name of this node: "
            "lower-case letters, digits and dashes, at most 32",
        ),
        (
            changed('listen = "10.0.0.1"', 'listen = ""'),
            '[link] listen = "": is empty; it is: address of this node on the link between the two',
        ),
        (
            changed('listen = "10.0.0.1"', 'listen = "10.0.0..1"'),
            '[link] listen = "10.0.0..1": is neither an address nor a name of a host, such as 10.0.0.3',
        ),
        (
            changed('peer = "10.0.0.2"', 'peer = "10.0.0.2:7788"'),
            '[link] peer = "10.0.0.2:7788": is neither an address nor a name of a host, such as 10.0.0.3',
        ),
        (
            changed("insecure = true", 'insecure = true\npeer_name = "web..b"'),
            '[link] peer_name = "web..b": is neither an address nor a name of a host, such as 10.0.0.3',
        ),
        (
            MINIMAL + '[http]\nlisten = "10.0.0.300"\n',
            '[http] listen = "10.0.0.300": is neither an address nor a name of a host, such as 10.0.0.3',
        ),
        (
            MINIMAL + '[[heartbeat.path]]\nname = "side"\nlisten = "10.1.0.1"\npeer = "10.1..2"\n',
            '[[heartbeat.path]] number 1, peer = "10.1..2": is neither an address nor a name of a host, '
            "such as 10.0.0.3",
        ),
        (
            changed("insecure = true", ""),
            "[link] certificate: is missing; give a PEM file, "
            "or set insecure = true on a link that nobody else can reach",
        ),
        (
            changed("insecure = true", 'insecure = true\nkey = "k.pem"'),
            '[link] key = "k.pem": is of no use with insecure = true; remove the one or the other',
        ),
        (
            changed("insecure = true", "insecure = true\nheartbeat_port = 7788"),
            "[link] heartbeat_port = 7788: is also [link] port; give the two different ports, such as 7789",
        ),
        (
            MINIMAL + "[http]\nport = 7789\n",
            "[http] port = 7789: is also [link] heartbeat_port; choose another, such as 7790",
        ),
        (
            MINIMAL + "[heartbeat]\ninterval_ms = 1000\nmisses = 100\n",
            "[heartbeat] misses = 100: with interval_ms = 1000 notices a loss after 100 s; "
            "keep interval_ms × misses within 60 s",
        ),
        (
            MINIMAL + "[epoch]\nin_flight_mib = 32\n",
            "[epoch] in_flight_mib = 32: is less than one slot ([staging] slot_mib = 64), "
            "so that a full one could never be sent; give at least 64",
        ),
        (
            MINIMAL + '[epoch]\nmode = "auto"\nlongest_ms = 9\n',
            "[epoch] longest_ms = 9: is less than shortest_ms = 10; give at least 10",
        ),
        (
            MINIMAL + '[epoch]\nmode = "auto"\nlatency_ms = 10\n',
            "[epoch] latency_ms = 10: cannot be held by epochs of shortest_ms = 10 or more; "
            "give more than 10, or shorter epochs",
        ),
        (
            MINIMAL + '[epoch]\nmode = "auto"\nlength_ms = 5\n',
            "[epoch] length_ms = 5: is what mode auto begins with; "
            "give a number from shortest_ms = 10 to longest_ms = 500",
        ),
        (
            MINIMAL + '[epoch]\nmode = "automatic"\n',
            "[epoch] mode = \"automatic\": is not one of the possible values; choose 'fixed' or 'auto'",
        ),
        (
            MINIMAL + '[epoch]\nspeculative = "auto"\nin_flight_mib = 100\n',
            "[epoch] in_flight_mib = 100: is less than two slots ([staging] slot_mib = 64), which a frame "
            "may fill with speculative transfer; give at least 128, or set [epoch] speculative = "
            '"off"',
        ),
        (
            MINIMAL + '[epoch]\nspeculative = "always"\n[staging]\nslots = 2\n',
            "[staging] slots = 2: is too few for speculative transfer, which needs one beside that of the "
            'checkpoint and the one being sent; give at least 3, or set [epoch] speculative = "off"',
        ),
        (
            MINIMAL + "[machine]\ndirty_ring_size = 5000\n",
            "[machine] dirty_ring_size = 5000: is not a power of two from 1024 to 65536; "
            "8192 would be, or 0 for the bitmap",
        ),
        (
            MINIMAL + '[machine]\nappend = "quiet"\n',
            '[machine] append = "quiet": needs a kernel; set [machine] kernel, or remove it',
        ),
        (
            MINIMAL + '[[machine.nic]]\ntap = "tap0"\nmac = "52:54"\n',
            '[[machine.nic]] number 1, mac = "52:54": is not well-formed; it is: '
            "hardware address of the card, the same on both nodes, such as 52:54:00:12:34:56",
        ),
        (
            MINIMAL
            + '[[machine.nic]]\ntap="tap0"\nmac="52:54:00:00:00:0a"\n'
            + '[[machine.nic]]\ntap="tap1"\nmac="52:54:00:00:00:0A"\n',
            '[[machine.nic]] number 2, mac = "52:54:00:00:00:0A": is that of number 1, too; '
            "give each its own",
        ),
        (
            MINIMAL + '[machine.nic]\ntap = "tap0"\n',
            "[machine] nic = {…}: is a table; write it as [[machine.nic]]",
        ),
        (
            changed('role = "primary"', 'role = "backup"') + '[machine]\nattach = "/run/q.sock"\n',
            '[machine] attach = "/run/q.sock": is for the primary only; '
            'remove it, or set [node] role = "primary"',
        ),
        (
            changed("[arbiter]\naccept_split_brain = true\n", ""),
            "[arbiter] accept_split_brain: without an arbiter a broken link lets both nodes run the guest; "
            "set [arbiter] kind to etcd or file, or accept_split_brain = true if you accept that",
        ),
        (
            changed("[link]", "[lnk]"),
            "[link]: is missing; add the section with listen, peer",
        ),
    ],
)
def test_mistake(write, text, expected):
    assert expected in problems(write(text))


@pytest.mark.parametrize(
    "host",
    ["10.0.0.3", "fd00::3", "fe80::1%eth0", "::ffff:10.0.0.3", "web-b", "b_1.example.", "bücher.example"],
)
def test_addresses_and_names_are_hosts(host):
    assert a_host(host) == host


@pytest.mark.parametrize(
    "host",
    ["", ".", "10.0.0..3", "10.0.0.300", "10.3", "1:2", "a b", "a/b", "a\0b", "\ud800", "x" * 64, "ab." * 85],
)
def test_other_words_are_not(host):
    with pytest.raises(ValueError, match="is neither an address nor a name of a host"):
        a_host(host)


def test_all_mistakes_are_told_at_once(write):
    found = problems(write(MINIMAL + "[epoch]\nlength_ms = 0\n[http]\nport = 0\n[staging]\nslots = 99\n"))
    assert len(found) == 3


def test_long_values_are_shortened(write):
    [problem] = problems(write(MINIMAL + f'[http]\nport = "{"x" * 500}"\n'))
    assert len(problem) < 150


def test_newline_in_a_value_stays_on_one_line(write):
    [problem] = problems(write(changed('name = "a"', 'name = "a\\nb"')))
    assert "\n" not in problem


# ---- files on this machine --------------------------------------------------------------------------------


def test_check_files_names_each_missing_one(write, tmp_path):
    config = load(
        write(MINIMAL + '[machine]\nkernel = "vmlinuz"\ninitrd = "initrd"\nmemory_path = "nowhere"\n')
    )
    (tmp_path / "initrd").touch()
    with pytest.raises(ConfigError) as caught:
        check_files(config)
    assert caught.value.problems == (
        f'[machine] kernel = "{tmp_path}/vmlinuz": no such file or directory; create it, or correct the path',
        f'[machine] memory_path = "{tmp_path}/nowhere": is not a folder; give one in a tmpfs or hugetlbfs',
    )
