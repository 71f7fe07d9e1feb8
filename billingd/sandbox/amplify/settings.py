"""The switches of the sandbox's Amplify: chiefly the open questions of amplify.md 10."""

from dataclasses import dataclass, fields
from typing import Any, Final

FEED_DAYS: Final = 7
"""How long the watch-topic feed keeps an event (amplify.md 4.5)."""
SAMPLE_DAYS: Final = 7
"""How long a sampled transaction is kept (amplify.md 6.1)."""
PAGE_SIZE: Final = 20
PAGE_SIZE_MAX: Final = 100


@dataclass(slots=True)
class Settings:
    """Each may be changed while the sandbox runs."""

    token_seconds: int = 1800
    """`expires_in` of a token (amplify.md 1.1)."""
    versions: str = "both"
    """both | v1alpha1 | mixed: which `{version}`s are served; mixed is the state of Dec 2025 (2.1)."""
    patch_attributes: bool = True
    """Whether PATCH may touch /attributes (question 16)."""
    subresource_moves_version: bool = True
    """Whether a subresource PUT raises resourceVersion (question 15)."""
    subresource_moves_modified: bool = False
    """Whether it moves modifyTimestamp (question 15)."""
    feed_lag_seconds: int = 0
    """How much later than its followers every third event shows in the feed (question 14)."""
    feed_repeats: bool = False
    """Whether the feed shows an event twice."""
    resource_hooks: bool = True
    """Whether stored ResourceHooks and Webhooks deliver, as the real ones do."""
    own_teams_only: bool = False
    """Whether the service account lacks Engage Admin, and sees what its teams own: nothing here (1.1)."""
    consumer_users_visible: bool = True
    """Whether users of a consumer organisation can be read (question 18)."""
    summary_groups: bool = True
    """Whether GET /summary groups by subscription, quota and plan (question 2)."""
    summary_units: str = "transactions"
    """transactions | all: what GET /summary counts; it has no unitId."""
    sample_percent: int = 0
    """How many calls in a hundred become documents that POST /search can see (6.1)."""
    lexus_wrapped: bool = False
    """Whether /search answers [{version, id, result}] instead of the bare result (6.3)."""
    zero_buckets: bool = False
    """Whether chartGroupedBy lists buckets without traffic with total 0."""

    def configure(self, **changes: Any) -> None:
        """Sets several by name, all or none; ValueError for an unknown name or value."""
        known = {field.name: type(getattr(self, field.name)) for field in fields(self)}
        for name, value in changes.items():
            if name not in known:
                raise ValueError(f"there is no setting '{name}'")
            if type(value) is not known[name]:
                raise ValueError(f"'{name}' takes a value of type {known[name].__name__}, not {value!r}")
            if name in CHOICES and value not in CHOICES[name]:
                raise ValueError(f"'{name}' takes one of {', '.join(CHOICES[name])}")
            if name in RANGES and not RANGES[name][0] <= value <= RANGES[name][1]:
                raise ValueError(f"'{name}' takes {RANGES[name][0]} to {RANGES[name][1]}")
        for name, value in changes.items():
            setattr(self, name, value)


CHOICES: Final = {"versions": ("both", "v1alpha1", "mixed"), "summary_units": ("transactions", "all")}
RANGES: Final = {"token_seconds": (1, 86_400), "sample_percent": (0, 100)}
