"""The QEMU process: started, found again, watched and ended, with a real QEMU."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ftd.errors import ConfigError, HostError, QemuDied, QemuError
from ftd.machine import MachineDescription
from ftd.monitor import Monitor
from ftd.qemu import QemuProcess, choose, is_running, require_patched

MIB = 1024 * 1024


@pytest.fixture
async def start():
    """Starts QEMU through ftd, and ends it after the test."""
    started: list[QemuProcess] = []

    async def start(config, **how) -> QemuProcess:
        process = await QemuProcess.start(config, **how)
        started.append(process)
        return process

    yield start
    for process in started:
        await process.kill()


# ---- starting ---------------------------------------------------------------------------------------------


async def test_started_guest_runs_with_its_memory_in_a_file(make_config, start):
    config = make_config()
    assert not is_running(config)
    qemu = await start(config)
    assert is_running(config)
    assert (await qemu.monitor.execute("query-status"))["running"] is True
    assert qemu.memory_file.stat().st_size == 32 * MIB
    assert qemu.memory_file.parent == config.machine.memory_path
    assert not qemu.attached
    files = {path.name for path in config.node.run_folder.iterdir()}
    assert files == {"qmp.sock", "operator.sock", "qemu.pid", "qemu.log"}
    assert int((config.node.run_folder / "qemu.pid").read_text()) == qemu.pid


async def test_shadow_waits(make_config, start):
    qemu = await start(make_config(), incoming=True)
    assert (await qemu.monitor.execute("query-status"))["status"] == "inmigrate"


async def test_operators_have_a_monitor_of_their_own(make_config, start):
    config = make_config()
    await start(config)
    async with await Monitor.connect(config.node.run_folder / "operator.sock") as operator:
        assert (await operator.execute("query-name"))["name"] == "a"


async def test_qemu_has_a_session_of_its_own(make_config, start):
    qemu = await start(make_config())
    assert os.getsid(qemu.pid) == qemu.pid


async def test_qemu_that_dies_at_its_start_is_quoted(make_config):
    config = make_config(machine={"arguments": ["-device", "nonsense"]})
    with pytest.raises(QemuError) as caught:
        await QemuProcess.start(config)
    log = config.node.run_folder / "qemu.log"
    assert str(caught.value) == (
        "QEMU ended at its start (exit status 1): -device nonsense: 'nonsense' is not a valid device model "
        f"name (see {log})"
    )


async def test_log_of_the_start_before_is_kept(make_config, start):
    bad = make_config(machine={"arguments": ["-device", "nonsense"]})
    with pytest.raises(QemuError):
        await QemuProcess.start(bad)
    await start(make_config())
    assert "nonsense" in (bad.node.run_folder / "qemu.log.1").read_text()


async def test_program_that_is_not_qemu(make_config):
    config = make_config(machine={"qemu": Path("/bin/false")})
    with pytest.raises(QemuError, match=r"QEMU ended at its start \(exit status 1\): it printed nothing"):
        await QemuProcess.start(config)


async def test_program_that_does_not_execute(make_config, folder):
    program = folder / "qemu"
    program.write_bytes(b"\x7fELF, but not really")
    program.chmod(0o755)
    with pytest.raises(HostError, match=f"cannot start QEMU: {program}: exec format error"):
        await QemuProcess.start(make_config(machine={"qemu": program}))


async def test_qemu_that_never_answers(make_config, folder):
    program = folder / "qemu"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    with pytest.raises(QemuError, match=r"does not answer 0\.3 s after its start"):
        await QemuProcess.start(make_config(machine={"qemu": program}), timeout=0.3)


async def test_cancelled_start_leaves_nothing(make_config):
    task = asyncio.create_task(QemuProcess.start(make_config()))
    await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    # The fixture of the folder looks for what was left.


async def test_one_qemu_for_a_node(make_config, start):
    await start(make_config())
    with pytest.raises(HostError, match=r"qmp\.sock: a QEMU of this node runs already; attach to it"):
        await QemuProcess.start(make_config())


async def test_arguments_that_cannot_be_protected_start_nothing(make_config):
    config = make_config(machine={"arguments": ["-snapshot"]})
    with pytest.raises(ConfigError, match="-snapshot: keeps writes in a file that the backup lacks"):
        await QemuProcess.start(config)
    assert not config.node.run_folder.exists()


async def test_run_folder_too_long_for_sockets(make_config, folder):
    node = {"name": "a", "role": "primary", "run_dir": folder / ("x" * 90)}
    with pytest.raises(
        HostError, match=r"run_dir = .* bytes too long for its sockets; choose a shorter path"
    ):
        await QemuProcess.start(make_config(node=node))


@pytest.mark.root
def test_memory_file_system_that_is_full(folder):
    """On a real tmpfs of 1 MiB, mounted where only the child process sees it."""
    script = (
        "import sys; from pathlib import Path; from ftd.qemu import create_memory_file\n"
        "create_memory_file(Path(sys.argv[1]) / 'a.ram', 2 << 20)"
    )
    inner = 'mount -t tmpfs -o size=1m none "$0" && exec "$1" -c "$2" "$0"'
    result = subprocess.run(
        ["unshare", "--mount", "sh", "-c", inner, folder, sys.executable, script],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert f"HostError: {folder}: guest memory needs 2 MiB and 1 MiB are free" in result.stderr


@pytest.mark.kvm
async def test_kvm_is_chosen_with_a_cpu_model_that_works(make_config, start):
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("/dev/kvm cannot be used here")
    config = make_config(machine={"accelerator": "auto"})
    choices = await choose(config)
    assert choices.accelerator == "kvm"
    assert choices.cpu in ("host", "qemu64")
    qemu = await start(config)
    assert (await qemu.monitor.execute("query-kvm"))["enabled"] is True


# ---- the end ----------------------------------------------------------------------------------------------


async def test_kill(make_config, start):
    qemu = await start(make_config())
    memory_file = qemu.memory_file
    await qemu.kill()
    assert qemu.exit_status == -signal.SIGKILL
    assert not memory_file.exists()
    assert qemu.monitor.lost.is_set()
    await qemu.kill()  # once more does no harm


async def test_quit(make_config, start):
    qemu = await start(make_config())
    assert qemu.shutdown is None
    await qemu.quit()
    assert qemu.exit_status == 0
    assert qemu.shutdown == "host-qmp-quit"  # it was wanted: no failure
    assert not qemu.memory_file.exists()


async def test_quit_of_a_qemu_that_hangs(make_config, start):
    qemu = await start(make_config())
    os.kill(qemu.pid, signal.SIGSTOP)
    await qemu.quit(timeout=0.3)
    assert qemu.exit_status == -signal.SIGKILL


async def test_death_is_noticed_by_every_waiter(make_config, start):
    qemu = await start(make_config())
    waiters = [asyncio.create_task(qemu.wait()) for _ in range(2)]
    await asyncio.sleep(0)
    os.kill(qemu.pid, signal.SIGKILL)
    assert await asyncio.wait_for(asyncio.gather(*waiters), 1) == [-signal.SIGKILL] * 2
    await asyncio.wait_for(qemu.monitor.lost.wait(), 1)
    with pytest.raises(QemuDied):
        await qemu.monitor.execute("query-status")


# ---- attaching --------------------------------------------------------------------------------------------


async def test_detached_guest_runs_on_and_is_found_again(make_config):
    config = make_config()
    first = await QemuProcess.start(config)
    await first.detach()
    await first.kill()  # it is no longer this one's to kill
    second = await QemuProcess.attach(config.node.run_folder / "qmp.sock")
    assert second.attached
    assert (second.pid, second.memory_files) == (first.pid, first.memory_files)
    assert (await second.monitor.execute("query-status"))["running"] is True
    await second.kill()
    # Both daemons are this process, as after a restart in place: it is our child still, and was waited for.
    assert second.exit_status == -signal.SIGKILL
    assert not second.memory_file.exists()


async def test_guest_outlives_the_daemon_that_started_it(make_config, folder):
    config = make_config()
    script = (
        "import asyncio, os, sys; from ftd.config import Config; from ftd.qemu import QemuProcess\n"
        "async def main():\n"
        "    await QemuProcess.start(Config.model_validate_json(sys.argv[1]))\n"
        "    os.killpg(0, 9)\n"
        "asyncio.run(main())"
    )
    daemon = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", script, config.model_dump_json()),
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert await daemon.wait() == -signal.SIGKILL
    assert is_running(config)
    qemu = await QemuProcess.attach(config.node.run_folder / "qmp.sock")
    assert (await qemu.monitor.execute("query-status"))["running"] is True
    await qemu.quit()
    assert not qemu.memory_file.exists()


async def test_memory_file_that_is_not_of_ftd_is_left_alone(run_qemu, folder):
    file = folder / "guest.ram"
    _, path = run_qemu(*shared_memory(file))
    qemu = await QemuProcess.attach(path)
    assert qemu.memory_file == file
    await qemu.kill()
    assert file.exists()


def shared_memory(file: Path, share: str = "on") -> list[str]:
    backend = f"memory-backend-file,id=ram0,mem-path={file},size=16M,share={share}"
    return ["-object", backend, "-machine", "pc,memory-backend=ram0", "-m", "16M"]


async def test_private_memory_cannot_be_attached(run_qemu):
    _, path = run_qemu("-machine", "pc", "-m", "16M")
    with pytest.raises(QemuError, match=r"pc\.ram is not in a file .*; start it with .*share=on"):
        await QemuProcess.attach(path)


async def test_unshared_file_cannot_be_attached(run_qemu, folder):
    _, path = run_qemu(*shared_memory(folder / "guest.ram", share="off"))
    with pytest.raises(QemuError, match=r"guest memory ram0 has share=off, .*; start it with .*share=on"):
        await QemuProcess.attach(path)


async def test_memory_without_a_name_cannot_be_attached(run_qemu):
    backend = "memory-backend-memfd,id=ram0,size=16M,share=on"
    _, path = run_qemu("-object", backend, "-machine", "pc,memory-backend=ram0", "-m", "16M")
    with pytest.raises(QemuError, match=r"ram0 is not in a file \(memory-backend-memfd\); start it with"):
        await QemuProcess.attach(path)


async def test_unlinked_memory_cannot_be_attached(run_qemu, folder):
    file = folder / "guest.ram"
    _, path = run_qemu(*shared_memory(file))
    await (await Monitor.connect(path)).close()  # it greets only when its memory is there
    file.unlink()
    with pytest.raises(QemuError, match=r"which is not a file \(any more\)"):
        await QemuProcess.attach(path)


async def test_refused_qemu_keeps_its_monitor_free(run_qemu):
    _, path = run_qemu("-machine", "pc", "-m", "16M")
    for _ in range(2):
        with pytest.raises(QemuError, match="is not in a file"):
            await QemuProcess.attach(path)


async def test_process_behind_a_proxy_is_not_taken_for_qemu(run_qemu, folder):
    _, path = run_qemu(*shared_memory(folder / "guest.ram"))

    async def copy(reader, writer):
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
        writer.close()

    async def forward(reader, writer):
        other_reader, other_writer = await asyncio.open_unix_connection(path)
        await asyncio.gather(copy(reader, other_writer), copy(other_reader, writer))

    proxy = folder / "proxy.sock"
    async with await asyncio.start_unix_server(forward, proxy):
        with pytest.raises(
            QemuError, match=rf"process {os.getpid()}, which opened this socket, does not map"
        ):
            await QemuProcess.attach(proxy)


# ---- what it is -------------------------------------------------------------------------------------------


class CommandList:
    """A monitor of a QEMU that has just these commands."""

    path = Path("/run/qmp.sock")

    def __init__(self, *names: str) -> None:
        self.names = names

    async def execute(self, command: str) -> list[dict[str, str]]:
        assert command == "query-commands"
        return [{"name": name} for name in self.names]


async def test_unpatched_qemu_is_told_from_a_patched_one():
    await require_patched(CommandList("stop", "x-ft-begin"))
    with pytest.raises(
        QemuError, match=r"/run/qmp\.sock: this QEMU lacks ftd's patches .* scripts/build-qemu"
    ):
        await require_patched(CommandList("stop", "cont"))


CARD = ("-netdev", "user,id=n", "-device", "virtio-net-pci,netdev=n,id=nic0,romfile=,mac=52:54:00:00:00:01")


async def describe(config, **how) -> MachineDescription:
    qemu = await QemuProcess.start(config, **how)
    try:
        return await MachineDescription.of(qemu.monitor)
    finally:
        await qemu.kill()


async def test_primary_and_shadow_are_the_same_machine(make_config):
    config = make_config(machine={"arguments": list(CARD)})
    primary = await describe(config)
    assert primary.differences(await describe(config, incoming=True)) == []
    assert primary.machine_type.startswith("pc-i440fx-")
    assert (primary.accelerator, primary.cpu_model, primary.vcpus) == ("tcg", "qemu64", 1)
    assert primary.memory_bytes == 32 * MIB
    assert primary.devices["id nic0"] == "virtio-net-pci, mac 52:54:00:00:00:01"
    assert primary.devices["PCI 00:02.0"] == "1af4:1000 Ethernet controller"
    assert primary.cpu_features


async def test_other_machine_is_told_apart(make_config):
    here = await describe(make_config(machine={"arguments": list(CARD)}))
    there = await describe(make_config(machine={"vcpus": 2, "memory_mib": 64, "cpu": "max"}))
    told = "\n".join(here.differences(there))
    for difference in (
        "vCPUs: 1 here, 2 on the peer",
        "memory: 32 MiB here, 64 MiB on the peer",
        "CPU model: qemu64 here, max on the peer",
        "device id nic0: virtio-net-pci, mac 52:54:00:00:00:01 here, absent on the peer",
    ):
        assert difference in told
