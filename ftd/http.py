"""The HTTP side of a node.

    GET  /         a page for people that refreshes itself
    GET  /status   everything, as JSON (ftd/status.py)
    GET  /metrics  for Prometheus (ftd/metrics.py)
    GET  /healthz  200 while the process is alive and its event loop on time; 503: a restart would help
    GET  /readyz   200 while the guest is protected, or alone by intent; 503 says why not
    GET  /peer-flight  the newest lines of the peer's flight recorder, fetched over the link, for `ftd why`
    POST /verify   compare all memory and all disks, and answer with the result
    POST /switchover, /takeover, /pause-protection, /resume-protection, /protect, /upgrade
                   what operators ask for; a JSON object with arguments, or nothing

A failure is JSON: {"error": "one line"}. There are no passwords here: by default it listens on this host
only, and what is asked for by POST must come from it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib import resources
from urllib.parse import urlsplit

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ftd import log
from ftd.config.fields import HostOrNone
from ftd.errors import FtdError, HostError, friendly
from ftd.metrics import CONTENT_TYPE, Metrics
from ftd.status import Failure, Health, StatusSource, why_not_ready

_log = log.get(__name__)

# A verification waits for the end of an epoch (10 s at most), hashes all memory on both sides and compares;
# then it reads all disks.
VERIFY_TIMEOUT = 3600.0

# The loop's lateness is measured this often, and the worst of the last ten seconds counts.
_LAG_INTERVAL = 0.25
_LAG_WINDOW = 10.0
# From here on the loop is unhealthy: heartbeats of the default settings (300 ms) would have been missed
# threefold.
LAG_LIMIT = 1.0

# A switchover waits for an epoch, the arbiter and the start of the guest.
CONTROL_TIMEOUT = 60.0

ACTIONS = ("switchover", "takeover", "pause-protection", "resume-protection", "protect", "upgrade")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class LoopLag:
    """Measures how late the event loop runs what it has to run.

    `worst` is the worst lateness of the last ten seconds, in seconds, including the one that is going on.
    """

    def __init__(self) -> None:
        window = int(_LAG_WINDOW / _LAG_INTERVAL)
        self._samples: deque[float] = deque([0.0], maxlen=window)
        self._due: float | None = None

    def worst(self) -> float:
        """Return the worst lateness; to be called in the loop's thread."""
        late = 0.0
        if self._due is not None:
            late = asyncio.get_running_loop().time() - self._due
        return max(late, *self._samples, 0.0)

    async def measure(self) -> None:
        """Measure until cancelled."""
        clock = asyncio.get_running_loop().time
        while True:
            self._due = clock() + _LAG_INTERVAL
            await asyncio.sleep(_LAG_INTERVAL)
            self._samples.append(max(0.0, clock() - self._due))


class _Api:
    def __init__(self, source: StatusSource, metrics: Metrics) -> None:
        self._source = source
        self._metrics = metrics
        self._lag = LoopLag()
        self._verifying = False
        self._page = resources.files("ftd").joinpath("page.html").read_text(encoding="utf-8")

    async def measuring(self, app: web.Application) -> AsyncIterator[None]:
        task = asyncio.create_task(self._lag.measure())
        yield
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    async def page(self, request: web.Request) -> web.Response:
        # The page shows what peers and guests said; nothing but its own script may run, nothing may load.
        policy = (
            "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        return web.Response(
            text=self._page, content_type="text/html", headers={"Content-Security-Policy": policy}
        )

    async def status(self, request: web.Request) -> web.Response:
        return _json(self._source.status())

    async def metrics(self, request: web.Request) -> web.Response:
        self._metrics.loop_lag.set(self._lag.worst())
        return web.Response(body=self._metrics.render(), headers={"Content-Type": CONTENT_TYPE})

    async def healthz(self, request: web.Request) -> web.Response:
        late = self._lag.worst()
        why = f"the event loop was {late:.1f} s late" if late > LAG_LIMIT else self._source.why_unhealthy()
        return self._health(why)

    async def readyz(self, request: web.Request) -> web.Response:
        return self._health(why_not_ready(self._source.status()))

    def _health(self, why: str | None) -> web.Response:
        state = self._source.status().state
        return _json(Health(ok=why is None, state=state, detail=why or "ok"), 200 if why is None else 503)

    async def verify(self, request: web.Request) -> web.Response:
        refuse_other_sites(request)
        if self._verifying:
            return _failure(409, "a verification is under way already; ask again when it is done")
        self._verifying = True
        try:
            report = await asyncio.wait_for(self._source.verify(), VERIFY_TIMEOUT)
        except TimeoutError:
            return _failure(504, f"gave no result within {VERIFY_TIMEOUT:.0f} s; it goes on: see ftd status")
        except FtdError as error:
            return _failure(409, str(error))
        finally:
            self._verifying = False
        return _json(report)

    async def peer_flight(self, request: web.Request) -> web.Response:
        try:
            return _json(await self._source.peer_flight())
        except FtdError as error:
            return _failure(409, str(error))

    async def control(self, request: web.Request) -> web.Response:
        refuse_other_sites(request)
        refuse_other_hosts(request)
        action = request.path.strip("/")
        try:
            body = await request.read()
            arguments = Arguments.model_validate_json(body or b"{}")
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"])) or "the body"
            if first["type"] == "value_error":
                return _failure(400, f"{where}: {first['ctx']['error']}")
            return _failure(400, f"{where}: {first['msg']}; give a JSON object such as {{}}")
        if action == "protect" and not arguments.host:
            return _failure(400, 'host: is missing; give the address of the new backup: {"host": "10.0.0.3"}')
        if action == "takeover" and not arguments.force:
            return _failure(
                409,
                "takeover by hand is without the arbiter's consent; read `ftd takeover --help`, then --force",
            )
        try:
            done = await asyncio.wait_for(
                self._source.control(action, arguments.model_dump()), CONTROL_TIMEOUT
            )
        except TimeoutError:
            return _failure(504, f"{action}: no result within {CONTROL_TIMEOUT:.0f} s; see ftd status")
        except FtdError as error:
            return _failure(409, str(error))
        return _json(done)


class Arguments(BaseModel):
    """Body of a POST of what an operator asks for. host, port: of `protect`; force: of `takeover`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    host: HostOrNone = ""
    port: int | None = Field(default=None, ge=1, le=65535)
    force: bool = False


def refuse_other_hosts(request: web.Request) -> None:
    """Refuse what would change something and does not come from this host; there are no passwords."""
    try:
        here = ipaddress.ip_address(request.remote or "").is_loopback
    except ValueError:
        here = False
    if not here:
        raise web.HTTPForbidden(text=f"{request.path} is taken from this host only, not {request.remote}")


def refuse_other_sites(request: web.Request) -> None:
    """Refuse a request that a page of another site made in somebody's browser; `ftd verify` sends no
    Origin."""
    origin = request.headers.get("Origin")
    if origin is not None and urlsplit(origin).netloc != request.host:
        raise web.HTTPForbidden(text=f"requests from {origin} are not accepted")


def _json(model: BaseModel, status: int = 200) -> web.Response:
    return web.Response(text=model.model_dump_json() + "\n", status=status, content_type="application/json")


def _failure(status: int, error: str) -> web.Response:
    return _json(Failure(error=" ".join(error.split())), status)


@web.middleware
async def _errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        response = await handler(request)
    except web.HTTPException as refusal:
        if refusal.status < 400:
            raise
        text = refusal.text or refusal.reason
        if isinstance(refusal, web.HTTPNotFound):
            text = f"nothing at {request.path}; there are /, /status, /metrics, /healthz, /readyz, /verify, "
            text += "/peer-flight, and what operators ask for: " + ", ".join(
                f"/{action}" for action in ACTIONS
            )
        elif isinstance(refusal, web.HTTPMethodNotAllowed):
            text = f"{request.path} takes {', '.join(sorted(refusal.allowed_methods))}, not {request.method}"
        response = _failure(refusal.status, text)
        if isinstance(refusal, web.HTTPMethodNotAllowed):
            response.headers["Allow"] = ", ".join(sorted(refusal.allowed_methods))
    except Exception as exception:
        _log.exception("HTTP request failed", exception, path=request.path)
        response = _failure(500, f"internal error, see the log of ftd: {friendly(exception)}")
    response.headers["Cache-Control"] = "no-store"
    response.headers["X-Content-Type-Options"] = "nosniff"
    return response


def create_app(source: StatusSource, metrics: Metrics) -> web.Application:
    """Return the application; `source` is asked anew for every request."""
    api = _Api(source, metrics)
    app = web.Application(middlewares=[_errors_as_json], client_max_size=64 * 1024)
    app.cleanup_ctx.append(api.measuring)
    app.add_routes(
        [
            web.get("/", api.page),
            web.get("/status", api.status),
            web.get("/metrics", api.metrics),
            web.get("/healthz", api.healthz),
            web.get("/readyz", api.readyz),
            web.get("/peer-flight", api.peer_flight),
            web.post("/verify", api.verify),
            *(web.post(f"/{action}", api.control) for action in ACTIONS),
        ]
    )
    return app


class Server:
    """A serving application. `port` is the one in use, also when 0 was asked for."""

    def __init__(self, runner: web.AppRunner, port: int) -> None:
        self._runner = runner
        self.port = port

    async def close(self) -> None:
        """Stop listening; requests under way have a second to end. May be called again."""
        await self._runner.cleanup()


async def serve(app: web.Application, listen: str = "127.0.0.1", port: int = 9105) -> Server:
    """Serve the application on an address until the returned server is closed. Port 0 takes a free one.

    Raises HostError, with nothing left open, when the address is not this host's or the port is taken.
    """
    # Signals are the node's; one line of log for each scrape would bury the story.
    runner = web.AppRunner(app, handle_signals=False, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        await web.TCPSite(runner, listen, port).start()
    except OSError as error:
        await runner.cleanup()
        raise HostError(_why_not_listening(listen, port, error)) from None
    _log.info("serving HTTP", address=listen, port=runner.addresses[0][1])
    return Server(runner, runner.addresses[0][1])


def _why_not_listening(listen: str, port: int, error: OSError) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return (
                f"[http] port = {port}: in use on {listen}; stop the program that holds it, or choose another"
            )
        case errno.EADDRNOTAVAIL:
            return f'[http] listen = "{listen}": not an address of this host; give one, or 127.0.0.1'
        case errno.EACCES:
            return f"[http] port = {port}: not permitted; choose one above 1023, or run ftd as root"
        case _:
            return f'[http] listen = "{listen}", port = {port}: {friendly(error)}'
