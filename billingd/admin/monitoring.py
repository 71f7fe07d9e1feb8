"""What watches billingd from outside: a Grafana dashboard and Prometheus alert rules, made from data here.

Every metric that an expression names is one of `billingd.admin.metrics`; a test compares them. Each alert has
a section in README ("Alerts and runbooks") under its own name.
"""

from dataclasses import dataclass
from typing import Any, Final

WIDTH: Final = 24
"""Grafana's grid has so many columns."""

SCHEMA_VERSION: Final = 39
"""Of Grafana's dashboards; Grafana 11 and newer read it, and migrate it by themselves."""


@dataclass(frozen=True, slots=True)
class Alert:
    """A rule: true for so long, it is told."""

    name: str
    expr: str
    lasts: str
    severity: str
    summary: str


ALERTS: Final = (
    Alert(
        "BillingdDown",
        "absent(billingd_build_info)",
        "5m",
        "critical",
        "No billingd answers a scrape. Nothing is billed while none runs; nothing is lost either.",
    ),
    Alert(
        "BillingdHangs",
        "billingd_loop_overdue == 1 or billingd_actions_hung > 0",
        "2m",
        "critical",
        "A part of billingd makes no progress ({{ $labels.loop }}).",
    ),
    Alert(
        "BillingdStoreNotWritable",
        "billingd_store_writable == 0"
        ' or increase(billingd_webhook_events_total{outcome="unavailable"}[5m]) > 0',
        "1m",
        "critical",
        "The store cannot be written, or not even read; webhooks are refused with 503.",
    ),
    Alert(
        "BillingdFarSideAway",
        "billingd_remote_reached == 0",
        "10m",
        "warning",
        "{{ $labels.side }} does not answer, or refuses the credentials.",
    ),
    Alert(
        "BillingdNotReady",
        "billingd_ready == 0",
        "15m",
        "warning",
        "/readyz has said 503 for a quarter of an hour.",
    ),
    Alert(
        "BillingdDeadLetters",
        'sum by (instance, kind) (billingd_outbox_actions{state="dead"}) > 0',
        "5m",
        "warning",
        "{{ $value }} actions of kind {{ $labels.kind }} gave up and wait for a person.",
    ),
    Alert(
        "BillingdTrafficLate",
        "billingd_traffic_lag_seconds > 6 * 3600",
        "30m",
        "warning",
        "Traffic was last read up to {{ $value | humanizeDuration }} ago.",
    ),
    Alert(
        "BillingdUsageNotReported",
        "min_over_time(billingd_usage_unreported_units[6h]) > 0",
        "5m",
        "warning",
        "Usage has not been at Recurly in full for six hours.",
    ),
    Alert(
        "BillingdUnknownOutcomes",
        "min_over_time(billingd_unknown_outcomes[2h]) > 0",
        "5m",
        "warning",
        "A write to Recurly has had no clear outcome for two hours.",
    ),
    Alert(
        "BillingdInvoiceMissed",
        "billingd_period_missed_units > 0",
        "15m",
        "warning",
        "{{ $value }} units missed the invoice of the last billing period.",
    ),
    Alert(
        "BillingdDrift",
        "billingd_drift_units > 0 or billingd_drift_findings > 0",
        "1h",
        "warning",
        "Amplify, the ledger and Recurly differ.",
    ),
    Alert(
        "BillingdHeld",
        'billingd_held{what="items"} > 0',
        "1h",
        "info",
        "{{ $value }} things are held for a person.",
    ),
    Alert(
        "BillingdWebhooksRejected",
        'increase(billingd_webhook_events_total{outcome="rejected"}[15m]) > 10',
        "15m",
        "warning",
        "Webhooks are rejected: a wrong secret, or somebody who should not send any.",
    ),
    Alert(
        "BillingdRequestsFail",
        'sum by (instance, side) (rate(billingd_remote_requests_total{outcome!~"ok|not_found"}[15m]))'
        " / sum by (instance, side) (rate(billingd_remote_requests_total[15m])) > 0.2",
        "15m",
        "warning",
        "{{ $value | humanizePercentage }} of the requests to {{ $labels.side }} fail.",
    ),
    Alert(
        "BillingdRequestsSlow",
        "histogram_quantile(0.95, sum by (instance, side, le)"
        " (rate(billingd_remote_request_seconds_bucket[15m]))) > 10",
        "30m",
        "info",
        "{{ $labels.side }} takes {{ $value | humanizeDuration }} for one in twenty requests.",
    ),
)


def anchor(alert: Alert) -> str:
    """The place of an alert's runbook in README."""
    return alert.name.lower()


def rules(runbooks: str) -> dict[str, Any]:
    """The alert rules as Prometheus reads them; `runbooks` is the URL of the page with their sections."""
    return {
        "groups": [
            {
                "name": "billingd",
                "rules": [
                    {
                        "alert": one.name,
                        "expr": one.expr,
                        "for": one.lasts,
                        "labels": {"severity": one.severity},
                        "annotations": {
                            "summary": one.summary,
                            "runbook_url": f"{runbooks}#{anchor(one)}",
                        },
                    }
                    for one in ALERTS
                ],
            }
        ]
    }


@dataclass(frozen=True, slots=True)
class Panel:
    """A part of the dashboard: expressions with what each line is called."""

    title: str
    targets: tuple[tuple[str, str], ...]
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 8
    about: str = ""
    least: int | None = 0


PANELS: Final = (
    (
        "Is money flowing?",
        Panel(
            "Ready", (("billingd_ready", "ready"),), kind="stat", width=4, about="1 while /readyz says 200."
        ),
        Panel(
            "Units at Recurly",
            (('billingd_usage_units_total{stage="reported"}', "reported"),),
            kind="stat",
            width=4,
        ),
        Panel("Not reported yet", (("billingd_usage_unreported_units", "units"),), kind="stat", width=4),
        Panel("Drift", (("billingd_drift_units", "units"),), kind="stat", width=4),
        Panel("Missed an invoice", (("billingd_period_missed_units", "units"),), kind="stat", width=4),
        Panel(
            "Dead letters",
            (('sum(billingd_outbox_actions{state="dead"}) or vector(0)', "actions"),),
            kind="stat",
            width=4,
        ),
    ),
    (
        "Usage",
        Panel(
            "Units recorded and reported",
            (("delta(billingd_usage_units_total[1h])", "{{stage}}"),),
            about="In the hour before each point; below 0 where units were taken back.",
            least=None,
        ),
        Panel("Traffic is behind by", (("billingd_traffic_lag_seconds", "lag"),), unit="s"),
        Panel(
            "Waiting for a clear outcome, or for a person",
            (
                ("billingd_unknown_outcomes", "unknown outcomes"),
                ("billingd_held", "held {{what}}"),
                ("billingd_drift_findings", "differences"),
            ),
        ),
    ),
    (
        "Work",
        Panel(
            "Actions that wait", (('billingd_outbox_actions{state!~"done|discarded"}', "{{state}} {{kind}}"),)
        ),
        Panel("The oldest of them is", (("billingd_outbox_oldest_pending_seconds", "age"),), unit="s"),
        Panel("Webhooks", (("rate(billingd_webhook_events_total[5m])", "{{outcome}}"),), unit="reqps"),
    ),
    (
        "Far sides",
        Panel(
            "Requests", (("rate(billingd_remote_requests_total[5m])", "{{side}} {{outcome}}"),), unit="reqps"
        ),
        Panel(
            "One in twenty takes longer than",
            (
                (
                    "histogram_quantile(0.95, sum by (side, le)"
                    " (rate(billingd_remote_request_seconds_bucket[5m])))",
                    "{{side}}",
                ),
            ),
            unit="s",
        ),
        Panel("Reached", (("billingd_remote_reached", "{{side}}"),)),
    ),
    (
        "The process",
        Panel("Since each loop turned", (("billingd_loop_turned_seconds", "{{loop}}"),), unit="s"),
        Panel(
            "What hangs, and whether the store can be written",
            (
                ("billingd_loop_overdue", "{{loop}} overdue"),
                ("billingd_actions_hung", "hung actions"),
                ("billingd_store_writable", "store writable"),
            ),
        ),
        Panel("Memory", (("process_resident_memory_bytes", "resident"),), unit="bytes"),
    ),
)


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana imports it; it asks for the data source itself."""
    panels: list[dict[str, Any]] = []
    top = 0
    for title, *row in PANELS:
        panels.append(_row(len(panels) + 1, str(title), top))
        top, left, height = top + 1, 0, 4 if all(_panel(one).kind == "stat" for one in row) else 8
        for one in row:
            panel = _panel(one)
            place = {"h": height, "w": panel.width, "x": left, "y": top}
            panels.append(_shown(len(panels) + 1, panel, place))
            left += panel.width
        top += height
    return {
        "uid": "billingd",
        "title": "billingd",
        "tags": ["billingd"],
        "schemaVersion": SCHEMA_VERSION,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-24h", "to": "now"},
        "timezone": "utc",
        "annotations": {"list": []},
        "templating": {
            "list": [
                {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}
            ]
        },
        "panels": panels,
    }


def _panel(one: str | Panel) -> Panel:
    assert isinstance(one, Panel)
    return one


def _row(number: int, title: str, top: int) -> dict[str, Any]:
    place = {"h": 1, "w": WIDTH, "x": 0, "y": top}
    return {"id": number, "type": "row", "title": title, "collapsed": False, "gridPos": place, "panels": []}


def _shown(number: int, panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${datasource}"}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "gridPos": place,
        "datasource": source,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": panel.least}, "overrides": []},
        "options": {},
        "targets": [
            {"refId": chr(ord("A") + n), "expr": expr, "legendFormat": legend, "datasource": source}
            for n, (expr, legend) in enumerate(panel.targets)
        ],
    }
