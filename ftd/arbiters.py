"""From the section [arbiter] to an arbiter."""

from __future__ import annotations

from ftd import config
from ftd.arbiter import Arbiter, NoArbiter
from ftd.errors import HostError, friendly


def identity(settings: config.Arbiter) -> str:
    """Return a word for what keeps the record: generations of another arbiter, or pair, say nothing of it."""
    return settings.kind if settings.kind == "none" else f"{settings.kind}:{settings.pair}"


def open_arbiter(settings: config.Arbiter) -> Arbiter:
    """Return the configured arbiter; nobody is asked yet. Raises HostError for files that cannot be used."""
    timeout = settings.timeout_ms / 1000
    if settings.kind == "none":
        return NoArbiter()
    if settings.kind == "file":
        from ftd.arbiter_file import FileArbiter  # noqa: PLC0415 - one kind is enough in memory

        assert settings.folder is not None
        return FileArbiter(settings.folder, settings.pair, timeout=timeout)
    from ftd.arbiter_etcd import EtcdArbiter, tls_context  # noqa: PLC0415

    password = ""
    if settings.password_file is not None:
        try:
            password = (settings.password_file.read_text(encoding="utf-8").splitlines() or [""])[0]
        except (OSError, UnicodeDecodeError) as error:
            raise HostError(f"[arbiter] password_file: {friendly(error)}") from None
    tls = None
    if settings.endpoints[0].startswith("https://"):
        tls = tls_context(settings.authority, settings.certificate, settings.key)
    return EtcdArbiter(
        settings.endpoints,
        f"/ftd/{settings.pair}/authority",
        timeout=timeout,
        tls=tls,
        user=settings.user,
        password=password,
    )
