"""Recurly (API V3) through its official SDK: money exact, every outcome classified by evidence."""

from billingd.adapters.recurly.adapter import Recurly

__all__ = ["Recurly"]
