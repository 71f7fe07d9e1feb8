"""`metrics`: what Grafana and Prometheus need to watch billingd."""

import click

from billingd.cli import output


@click.group(short_help="Print a Grafana dashboard and Prometheus alert rules.")
def metrics() -> None:
    """Print what Grafana and Prometheus need; /metrics on the admin listener has the numbers.

    \b
    Example:
      billingd metrics alerts > /etc/prometheus/rules/billingd.yml
      billingd metrics dashboard > billingd-dashboard.json
    """


@metrics.command()
def dashboard() -> None:
    """Print the Grafana dashboard (JSON), to be imported; it asks for the Prometheus data source.

    \b
    Example:
      billingd metrics dashboard > billingd-dashboard.json
    """
    from billingd.admin import monitoring

    output.document(monitoring.dashboard())


@metrics.command()
@click.option(
    "--runbooks",
    metavar="URL",
    default="README.md",
    show_default=True,
    help="Where the page with the runbooks is read, for the alerts to link to.",
)
@output.json_option
def alerts(runbooks: str, as_json: bool) -> None:
    """Print the Prometheus alert rules (YAML); their thresholds suit the default configuration.

    \b
    Example:
      billingd metrics alerts > /etc/prometheus/rules/billingd.yml
      billingd metrics alerts --runbooks https://wiki.example.com/billingd
    """
    import yaml

    from billingd.admin import monitoring

    rules = monitoring.rules(runbooks)
    if as_json:
        output.document(rules)
    else:
        click.echo(yaml.safe_dump(rules, sort_keys=False, allow_unicode=True, width=10_000), nl=False)
