"""Which Recurly account pays for an Amplify subscription."""

from billingd.domain.catalog import Subscription


def candidates(subscription: Subscription) -> tuple[str, ...]:
    """The account codes that may pay, the most specific first: user, team, organisation.

    The user is the owner where Amplify names one, else whoever subscribed. Ids are lower-cased: Recurly's
    codes know no capitals (recurly.md 4.1).
    """
    user = subscription.owner_user_id or subscription.created_by
    named = (("user", user), ("team", subscription.owner_team_id), ("org", subscription.owner_org_id))
    return tuple(f"amplify-{kind}-{id_.lower()}" for kind, id_ in named if id_)


def owner(subscription: Subscription) -> str | None:
    """The account code to create when none exists: the owner's own, not that of whoever clicked."""
    named = (
        ("user", subscription.owner_user_id),
        ("team", subscription.owner_team_id),
        ("org", subscription.owner_org_id),
        ("user", subscription.created_by),
    )
    return next((f"amplify-{kind}-{id_.lower()}" for kind, id_ in named if id_), None)
