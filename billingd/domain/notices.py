"""Notices to people, as actions: each is told once, and none holds back billing."""

from typing import Final

from billingd.domain.attempts import Action

NOTIFY_PROVIDER: Final = "notify_provider"
NOTIFY_SUBSCRIBER: Final = "notify_subscriber"


def provider_notice(key: str, title: str, body: str) -> Action:
    """Tell the provider something once: the key is unique for ever, and so is the notice."""
    return Action(
        NOTIFY_PROVIDER, f"notice:{key}", f"{NOTIFY_PROVIDER}:{key}", {"title": title, "body": body}
    )


def subscriber_notice(key: str, user_id: str, title: str, body: str) -> Action:
    """Mail somebody at Amplify once, if they have an address."""
    return Action(
        NOTIFY_SUBSCRIBER,
        f"notice:{key}",
        f"{NOTIFY_SUBSCRIBER}:{key}",
        {"user_id": user_id, "title": title, "body": body},
    )
