"""What Prometheus is told (names: contract section 4)."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from billingd import __version__

SECONDS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40)


class _UsageUnits(Collector):
    """What the ledger has. No counter but for the name: a unit that is taken back is one less."""

    def __init__(self) -> None:
        self.units = {"recorded": 0, "reported": 0}

    def collect(self) -> Iterator[Metric]:
        family = GaugeMetricFamily(
            "billingd_usage_units_total",
            "Units in the ledger, by how far they have come; fewer when some are taken back, so use delta()",
            labels=["stage"],
        )
        for stage, units in self.units.items():
            family.add_metric([stage], units)
        yield family


class Metrics:
    """The process's metrics, and the store's, which are filled from a status document at each scrape."""

    def __init__(self) -> None:
        self._registry, self._stored = CollectorRegistry(), CollectorRegistry()
        self._events = Counter(
            "billingd_webhook_events",
            "Webhook deliveries by outcome",
            ["outcome"],
            registry=self._registry,
        )
        self._requests = Counter(
            "billingd_remote_requests",
            "Requests to a far side by outcome",
            ["side", "outcome"],
            registry=self._registry,
        )
        self._seconds = Histogram(
            "billingd_remote_request_seconds",
            "How long a far side took",
            ["side"],
            buckets=SECONDS,
            registry=self._registry,
        )
        self._actions = Gauge(
            "billingd_outbox_actions", "Actions by state and kind", ["state", "kind"], registry=self._stored
        )
        self._oldest = self._of_store(
            "billingd_outbox_oldest_pending_seconds", "Age of the oldest unfinished action"
        )
        self._lag = self._of_store("billingd_traffic_lag_seconds", "Now less the watermark")
        self._unreported = self._of_store(
            "billingd_usage_unreported_units", "Recorded, neither reported nor written off"
        )
        self._unknown = self._of_store("billingd_unknown_outcomes", "Writes to Recurly with no clear outcome")
        self._missed = self._of_store(
            "billingd_period_missed_units",
            "Units that missed the invoice of the last billing period, not written off",
        )
        self._drift = self._of_store(
            "billingd_drift_units", "Units in which the latest reconciliation differed, not mended since"
        )
        self._findings = self._of_store(
            "billingd_drift_findings", "Differences that the latest reconciliation found, not mended since"
        )
        self._held = Gauge("billingd_held", "Things held for a person", ["what"], registry=self._stored)
        self._usage = _UsageUnits()
        self._stored.register(self._usage)
        self._ready = self._gauge("billingd_ready", "1 while /readyz says 200")
        self._writable = self._gauge(
            "billingd_store_writable", "0 while the store cannot be written, or not even read"
        )
        self._overdue = Gauge(
            "billingd_loop_overdue",
            "1 while a loop takes longer than it should",
            ["loop"],
            registry=self._registry,
        )
        self._age = Gauge(
            "billingd_loop_turned_seconds", "Since a loop last turned", ["loop"], registry=self._registry
        )
        self._hung = self._gauge("billingd_actions_hung", "Attempts that take longer than any should")
        self._reached = Gauge(
            "billingd_remote_reached", "1 while a far side answers", ["side"], registry=self._registry
        )
        Gauge("billingd_build_info", "The version", ["version"], registry=self._registry).labels(
            __version__
        ).set(1)
        ProcessCollector(registry=self._registry)
        for outcome in ("accepted", "duplicates", "rejected", "unavailable"):
            self._events.labels(
                outcome
            )  # from 0 on: a rate over a counter that appears late misses its first
        for side in ("amplify", "recurly"):
            self._requests.labels(side, "ok")
            self._seconds.labels(side)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, registry=self._registry)

    def _of_store(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, registry=self._stored)

    def webhook(self, outcome: str) -> None:
        """Count a delivery."""
        self._events.labels(outcome).inc()

    def observer(self, side: str) -> Callable[[str, float], None]:
        """What an adapter calls after each request, with its outcome and seconds."""

        def observe(outcome: str, seconds: float) -> None:
            self._requests.labels(side, outcome).inc()
            self._seconds.labels(side).observe(seconds)

        return observe

    def seen(
        self, *, ready: bool, writable: bool, loops: Mapping[str, tuple[float, float]], hung: int
    ) -> None:
        """How the process is; `loops` has the seconds since each turned, and those that it may take."""
        self._ready.set(ready)
        self._writable.set(writable)
        for loop, (age, patience) in loops.items():
            self._age.labels(loop).set(age)
            self._overdue.labels(loop).set(age > patience)
        self._hung.set(hung)

    def reached(self, side: str, *, reached: bool) -> None:
        """Whether a far side answers."""
        self._reached.labels(side).set(reached)

    def names(self) -> set[str]:
        """Every name of a sample that a scrape may show."""
        families = [*self._registry.collect(), *self._stored.collect()]
        return {
            sample for family in families for sample in {family.name, *(one.name for one in family.samples)}
        } | {f"{family.name}_total" for family in families if family.type == "counter"}

    def render(self, figures: tuple[dict[str, Any], dict[tuple[str, str], int]] | None) -> bytes:
        """The exposition text; None: the store cannot be read, and nothing is said of what is in it."""
        if figures is None:
            return generate_latest(self._registry)
        status, actions = figures
        self._actions.clear()
        for (state, kind), number in actions.items():
            self._actions.labels(state, kind).set(number)
        traffic = status["traffic"]
        self._oldest.set(status["outbox"]["oldest_pending_seconds"] or 0)
        self._lag.set(traffic["lag_seconds"] or 0)
        self._unreported.set(traffic["unreported_units"] - traffic["written_off_units"])
        self._unknown.set(traffic["unknown_outcomes"])
        self._missed.set(status["periods"]["missed_units"])
        self._drift.set(status["drift"]["units"])
        self._findings.set(status["drift"]["findings"])
        held = status["held"]
        self._held.labels("items").set(held["standing"])
        for what in ("plans", "subscriptions", "units"):
            self._held.labels(what).set(held[what])
        self._usage.units = {
            "recorded": traffic["recorded_units"],
            "reported": traffic["reported_units"],
        }
        return generate_latest(self._registry) + generate_latest(self._stored)
