"""TLS between two daemons: both sides show a certificate of the same authority, TLS 1.3 only.

Trouble with this side's own files is a ConfigError and is found at start, before any peer is asked:
`load_identity` lets the certificate shake hands with itself in memory, which checks dates, chain, key and
purposes just as a peer will. What a peer shows is judged in two places: OpenSSL checks the chain and the
dates, and `check_peer_name` the name. Names are taken from the subject alternative names (DNS and IP), never
from the common name.
"""

import ipaddress
import ssl
import stat
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from ftd.errors import ConfigError, FtdError, LinkError, PeerError

EXPIRY_WARNING = timedelta(days=30)

# X.509 verification codes of OpenSSL (x509_vfy.h); they are an interface and do not change.
_NOT_YET_VALID, _EXPIRED = 9, 10
_UNKNOWN_AUTHORITY = (2, 18, 19, 20, 21)
_WRONG_NAME = (62, 64)
_SIGNATURE_WRONG = 7
_WRONG_PURPOSE = 26


@dataclass(frozen=True)
class TlsFiles:
    """PEM files: this host's certificate (with intermediates, if any), its key, and the authority's
    certificate.
    """

    certificate: Path
    key: Path
    authority: Path


@dataclass(frozen=True)
class Identity:
    """This host's certificate, ready to use on both ends of a connection."""

    server: ssl.SSLContext
    client: ssl.SSLContext
    names: tuple[str, ...]
    expires: datetime
    warnings: tuple[str, ...]  # what works today and should be looked at


def load_identity(files: TlsFiles) -> Identity:
    """Read and check the files. Raises ConfigError, one line that names the file and the remedy."""
    for label, path in (
        ("certificate", files.certificate),
        ("key", files.key),
        ("authority", files.authority),
    ):
        _check_readable(label, path)
    server = _context(ssl.PROTOCOL_TLS_SERVER, files)
    client = _context(ssl.PROTOCOL_TLS_CLIENT, files)
    trial = _context(ssl.PROTOCOL_TLS_CLIENT, files)
    trial.check_hostname = False
    own = _handshake_with_oneself(server, trial, files)
    expires = datetime.fromtimestamp(ssl.cert_time_to_seconds(str(own["notAfter"])), UTC)
    return Identity(server, client, peer_names(own), expires, _warnings(files, expires))


def peer_names(certificate: dict[str, Any]) -> tuple[str, ...]:
    """Return the DNS names and IP addresses in what `SSLSocket.getpeercert()` gave."""
    return tuple(
        value for kind, value in certificate.get("subjectAltName", ()) if kind in ("DNS", "IP Address")
    )


def check_peer_name(certificate: dict[str, Any] | None, expected: str) -> None:
    """Check that a certificate was issued to `expected`, a DNS name or an IP address.

    OpenSSL does this for the connecting side; the accepting side has to do it itself. Wildcards are not
    honoured: one certificate names one host. Raises PeerError.
    """
    names = peer_names(certificate or {})
    if _normal(expected) not in {_normal(name) for name in names}:
        raise PeerError(
            f"the peer's certificate is for {', '.join(names) or 'no name at all'}, expected {expected}; "
            "correct peer_name, or issue a certificate with that name"
        )


def explain(error: ssl.SSLError, peer: str, *, expected: str = "") -> FtdError:
    """Translate what OpenSSL says about a connection with `peer`: PeerError if it is about who that is,
    else LinkError.
    """
    if isinstance(error, ssl.SSLCertVerificationError):
        return PeerError(f"{peer}: {_explain_verification(error, expected)}")
    reason = error.reason or ""
    for part, text in _REASONS.items():
        if part in reason:
            return PeerError(f"{peer}: {text}")
    return LinkError(f"{peer}: TLS failed: {_words(error)}")


# In reasons of OpenSSL, "ALERT" marks what the other side said about us.
_REASONS = {
    "ALERT_UNKNOWN_CA": "the peer does not know the authority of our certificate; "
    "use certificates of one authority on both hosts",
    "ALERT_CERTIFICATE_EXPIRED": "the peer says that our certificate has expired; "
    "issue a new one, or set the clocks",
    "ALERT_CERTIFICATE_REQUIRED": "the peer wants a certificate and we showed none; set certificate and key",
    "ALERT_BAD_CERTIFICATE": "the peer does not accept our certificate; "
    "is it of the same authority and still valid?",
    "ALERT_PROTOCOL_VERSION": "the peer refused our version of TLS; both sides need TLS 1.3",
    "ALERT_DECRYPT_ERROR": "the peer could not check our signature; do certificate and key belong together?",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "the peer showed no certificate; one of our authority is required",
    "UNSUPPORTED_PROTOCOL": "the peer offers no TLS 1.3, which is required",
    "HTTP_REQUEST": "the peer sent an HTTP request to a port of the link",
    "WRONG_VERSION_NUMBER": "what came is no TLS; insecure must be the same on both hosts",
}


def _explain_verification(error: ssl.SSLCertVerificationError, expected: str) -> str:
    code = error.verify_code
    if code == _EXPIRED:
        return "the peer's certificate has expired; issue a new one there, or set the clocks"
    if code == _NOT_YET_VALID:
        return "the peer's certificate is not valid yet; set the clocks of both hosts"
    if code in _UNKNOWN_AUTHORITY or code == _SIGNATURE_WRONG:
        return "the peer's certificate is of another authority than ours; use one authority on both hosts"
    if code in _WRONG_NAME:
        return (
            f"the peer's certificate is not for {expected or 'the expected name'}; "
            "correct peer_name, or issue a certificate with that name"
        )
    if code == _WRONG_PURPOSE:
        return "the peer's certificate may not be used for this; it needs both serverAuth and clientAuth"
    return f"the peer's certificate is not accepted: {error.verify_message}"


def _normal(name: str) -> str:
    try:
        return ipaddress.ip_address(name).compressed
    except ValueError:
        return name.rstrip(".").lower()


def _words(error: ssl.SSLError) -> str:
    return (error.reason or error.strerror or str(error)).replace("_", " ").lower()


def _check_readable(label: str, path: Path) -> None:
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{label} = {path}: no such file; scripts/make-certificates makes one") from None
    except OSError as error:
        raise ConfigError(
            f"{label} = {path}: cannot be read: {(error.strerror or str(error)).lower()}"
        ) from None
    if b"-----BEGIN " not in text:
        raise ConfigError(f"{label} = {path}: no PEM file (it has no BEGIN line); convert it with openssl")


def _refuse_passphrase() -> str:
    raise ConfigError("encrypted")


def _context(protocol: int, files: TlsFiles) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.hostname_checks_common_name = False
    # Tickets would lie unread on the frames connection, which its sender never reads, and closing a socket
    # with unread data makes the kernel throw away what the peer has not read yet. Nobody resumes sessions
    # here.
    if protocol == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0
    try:
        context.load_cert_chain(files.certificate, files.key, password=_refuse_passphrase)
    except ConfigError:
        raise ConfigError(
            f"key = {files.key}: it is encrypted, and a daemon cannot be asked for the passphrase; "
            "give an unencrypted key that only ftd's user can read"
        ) from None
    except ssl.SSLError as error:
        if "KEY_VALUES_MISMATCH" in (error.reason or "") or "KEY_TYPE_MISMATCH" in (error.reason or ""):
            raise ConfigError(
                f"key = {files.key}: it does not belong to the certificate {files.certificate}; "
                "give the key that was made with it"
            ) from None
        raise ConfigError(
            f"certificate = {files.certificate}, key = {files.key}: cannot be used: {_words(error)}"
        ) from None
    try:
        context.load_verify_locations(files.authority)
    except ssl.SSLError as error:
        raise ConfigError(f"authority = {files.authority}: cannot be used: {_words(error)}") from None
    return context


def _handshake_with_oneself(
    server: ssl.SSLContext, client: ssl.SSLContext, files: TlsFiles
) -> dict[str, Any]:
    """Return the own certificate as a peer sees it."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    one = client.wrap_bio(to_client, to_server)
    two = server.wrap_bio(to_server, to_client, server_side=True)
    waiting = [one, two]
    try:
        # Three flights; each round moves one of them from one side to the other.
        for _ in range(4):
            for side in list(waiting):
                try:
                    side.do_handshake()
                    waiting.remove(side)
                except ssl.SSLWantReadError:
                    pass
    except ssl.SSLCertVerificationError as error:
        if error.verify_code == _EXPIRED:
            what = "it has expired, or its authority has; issue a new one with scripts/make-certificates"
        elif error.verify_code == _NOT_YET_VALID:
            what = "it is not valid yet; set this host's clock"
        elif error.verify_code in _UNKNOWN_AUTHORITY or error.verify_code == _SIGNATURE_WRONG:
            what = f"it was not issued by the authority {files.authority}; give the authority that did"
        elif error.verify_code == _WRONG_PURPOSE:
            what = "it may not be used for this; it needs the extended key usages serverAuth and clientAuth"
        else:
            what = f"it is not accepted: {error.verify_message}"
        raise ConfigError(f"certificate = {files.certificate}: {what}") from None
    except ssl.SSLError as error:
        raise ConfigError(f"certificate = {files.certificate}: cannot be used: {_words(error)}") from None
    certificate = one.getpeercert()
    if waiting or not certificate:
        raise ConfigError(
            f"certificate = {files.certificate}: a TLS 1.3 connection with it does not come about"
        )
    if not peer_names(certificate):
        raise ConfigError(
            f"certificate = {files.certificate}: it names no host (no subject alternative name of type DNS "
            "or IP); scripts/make-certificates makes one that does"
        )
    return certificate


def _warnings(files: TlsFiles, expires: datetime) -> tuple[str, ...]:
    found = []
    left = expires - datetime.now(UTC)
    if left < EXPIRY_WARNING:
        found.append(f"certificate {files.certificate} expires in {left.days} days, on {expires:%Y-%m-%d}")
    mode = stat.S_IMODE(files.key.stat().st_mode)
    if mode & 0o077:
        found.append(f"key {files.key} can be read by others (mode {mode:03o}); chmod 600 it")
    return tuple(found)
