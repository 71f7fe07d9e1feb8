"""Amplify over HTTP: the catalog, approvals, people, and the traffic counts."""

from billingd.adapters.amplify.client import Amplify
from billingd.adapters.amplify.regions import REGIONS, Region
from billingd.adapters.amplify.traffic import TrafficSource, traffic_source

__all__ = ["REGIONS", "Amplify", "Region", "TrafficSource", "traffic_source"]
