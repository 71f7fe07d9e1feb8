"""billingd: bills Axway Amplify Marketplace subscriptions through Recurly, every unit once."""

from importlib.metadata import version

__version__ = version("billingd")
