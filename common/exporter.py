"""``metrics.prometheus``: a process answers Prometheus' scrapes about itself.

::

    Tracer, live objects -> families() at the moment of a scrape -> http://host:port/metrics, a thread of its own
                         -> RUN_DIR/prometheus/<process>.json, a target that Prometheus' file_sd finds

A scrape reads what the process's loop leaves lying about and takes no lock of it. Nothing here can end or hold up
the process: where no port is free, a warning says so and it goes on unseen.
"""

import contextlib
import json
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from socketserver import TCPServer, ThreadingMixIn
from typing import TYPE_CHECKING, Any, Literal
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from common.config import RunConfig
from common.trace import Tracer

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from common.link import BrokerLink

TARGETS = "prometheus"  # within the run directory
PORTS_TRIED = 64  # from metrics.port upwards: processes share a machine
SLOWEST_S = 10.0  # a client that reads slower is left alone
POLL_S = 0.1  # how long a process waits at most for its server's end
READ_AGAIN = 3  # times; a dict may change while it is being copied
EVERYWHERE = ("", "0.0.0.0", "::")

log = logging.getLogger("exporter")

Labels = tuple[tuple[str, str], ...]


@dataclass
class Family:
    """One metric: its name as Prometheus has it (units, ``_total`` for counters), a value for each set of labels."""

    kind: Literal["counter", "gauge"]
    name: str
    help: str
    samples: dict[Labels, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.name.endswith("_total") == (self.kind == "counter"), self.name


@dataclass
class Histogram:
    """``counts`` by whole number, as Prometheus' cumulative buckets up to each of ``bounds``."""

    name: str
    help: str
    counts: Mapping[int, float]
    bounds: Sequence[int]


Families = Iterable[Family | Histogram]


def counter(name: str, help: str, value: float | None = None, **by: Mapping[str, float]) -> Family:
    """``counter("a_total", "…", 3)``, or ``counter("a_total", "…", reason={"lag": 3})`` for one a label."""
    return Family("counter", name, help, _samples(value, by))


def gauge(name: str, help: str, value: float | None = None, **by: Mapping[str, float]) -> Family:
    """As :func:`counter`, for what may fall. Without a value it has no samples."""
    return Family("gauge", name, help, _samples(value, by))


def _samples(value: float | None, by: Mapping[str, Mapping[str, float]]) -> dict[Labels, float]:
    if not by:
        return {} if value is None else {(): float(value)}
    ((label, values),) = by.items()
    return {((label, str(name)),): float(found) for name, found in dict(values).items()}


# ---- what every process tells ---------------------------------------------------------------------


def families_of(tracer: Tracer) -> Families:
    """Time by state, and the sums of what its work cost (common.trace.TALLIES)."""
    yield counter("croupier_state_seconds_total", "Wall-clock of the main thread by state.", state=tracer.seconds())
    work = {name: [sum(column) for column in zip(*list(by_key.values()), strict=True)]
            for name, by_key in list(tracer.tallies.items())}  # fmt: skip
    sums = {name: figures for name, figures in work.items() if figures}
    yield counter("croupier_work_times_total", "How often the work was done.", work=_column(sums, 0))
    yield counter("croupier_work_seconds_total", "Wall-clock of the work.", work=_column(sums, 1, 1e-9))
    yield counter("croupier_work_cpu_seconds_total", "CPU time of the work.", work=_column(sums, 2, 1e-9))
    yield counter("croupier_work_amount_total", "Tokens, bytes or trajectories worked on.", work=_column(sums, 3))


def families_of_peer(link: "BrokerLink") -> Families:
    """What every process but the broker tells of its way to it."""
    yield gauge("croupier_version_held", "The version of the weights that this process holds.", link.version)
    yield gauge("croupier_link_up", "1 while the broker knows this process.", float(link.welcomed))
    best = link.tracer.offset.best
    offset = None if best is None else best[1] / 1e9
    yield gauge("croupier_link_clock_offset_seconds", "The broker's clock less this process's.", offset)


def _column(sums: Mapping[str, list[float]], index: int, unit: float = 1.0) -> dict[str, float]:
    return {name: figures[index] * unit for name, figures in sums.items()}


class Exporter:
    """What a process tells: its tracer's figures, and what its owner gives as :attr:`families`."""

    def __init__(self, tracer: Tracer) -> None:
        self.tracer = tracer
        self.families: Callable[[], Families] = tuple

    def collect(self) -> "Iterator[Metric]":
        """For Prometheus' registry."""
        for found in (*families_of(self.tracer), *self._own()):
            yield _metric(found)

    def _own(self) -> list[Family | Histogram]:
        for _ in range(READ_AGAIN):
            with contextlib.suppress(RuntimeError):  # "changed size during iteration": the loop goes on meanwhile
                return list(self.families())
        return []


def _metric(found: Family | Histogram) -> "Metric":
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

    if isinstance(found, Histogram):
        counts, seen = dict(found.counts), 0.0
        buckets = []
        for bound in found.bounds:
            seen = sum(count for value, count in counts.items() if value <= bound)
            buckets.append((str(float(bound)), seen))
        buckets.append(("+Inf", sum(counts.values())))
        total = sum(value * count for value, count in counts.items())
        return HistogramMetricFamily(found.name, found.help, buckets=buckets, sum_value=total)
    names = [label for label, _ in next(iter(found.samples), ())]
    kind = CounterMetricFamily if found.kind == "counter" else GaugeMetricFamily
    metric = kind(found.name, found.help, labels=names)
    for labels, value in found.samples.items():
        metric.add_metric([text for _, text in labels], value)
    return metric


# ---- the server -----------------------------------------------------------------------------------


class _Server(ThreadingMixIn, WSGIServer):
    """A thread a client; all of them end with the process."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, host: str, port: int) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        """Without asking a name server who we are."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is nobody's trouble."""
        log.debug("a scrape by %s failed", client_address, exc_info=True)


class _Handler(WSGIRequestHandler):
    timeout = SLOWEST_S

    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes come every few seconds."""


@contextlib.contextmanager
def open_exporter(config: RunConfig, tracer: Tracer) -> Iterator[Exporter]:
    """Answer scrapes about ``tracer``'s process while the block runs, if ``metrics.prometheus`` says so."""
    exporter = Exporter(tracer)
    server = _listen(config, exporter) if config.metrics.prometheus else None
    if server is None:
        yield exporter
        return
    thread = threading.Thread(target=server.serve_forever, args=(POLL_S,), name="exporter", daemon=True)
    thread.start()
    target = config.run.path / TARGETS / f"{tracer.process}.json"
    _announce(target, config, tracer, server.server_port)
    try:
        yield exporter
    finally:
        with contextlib.suppress(OSError):
            target.unlink(missing_ok=True)
        server.shutdown()
        server.server_close()


def _listen(config: RunConfig, exporter: Exporter) -> _Server | None:
    from prometheus_client import CollectorRegistry, ProcessCollector, make_wsgi_app

    section = config.metrics
    registry = CollectorRegistry()
    registry.register(exporter)
    ProcessCollector(registry=registry)
    ports = range(section.port, min(section.port + PORTS_TRIED, 1 << 16)) if section.port else (0,)
    error: OSError | None = None
    for port in ports:
        try:
            server = _Server(section.host, port)
        except OSError as failed:
            error = failed
            continue
        server.set_app(make_wsgi_app(registry))
        return server
    log.warning("no metrics of this process: nothing to listen on at %s:%s: %s", section.host, section.port, error)
    return None


def _announce(path: Path, config: RunConfig, tracer: Tracer, port: int) -> None:
    """Replace the target's file whole: Prometheus reads it at any moment."""
    host = socket.gethostname() if config.metrics.host in EVERYWHERE else config.metrics.host
    labels = {"run": config.run.name, "process": tracer.process, "role": tracer.role}
    target = [{"targets": [f"[{host}]:{port}" if ":" in host else f"{host}:{port}"], "labels": labels}]
    half = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        half.write_text(json.dumps(target) + "\n")
        half.replace(path)
    except OSError as error:
        log.warning("%s: not written, so Prometheus must be told of %s:%d: %s", path, host, port, error)
