"""What a site tells its webhooks: pointers to what changed, never the change itself (4.10)."""

import hmac
import json
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from typing import Any
from uuid import uuid4

from billingd.sandbox.recurly.model import Subscription, Usage


@dataclass(frozen=True, slots=True)
class Notice:
    """One event; `id` is the same at each try to deliver it."""

    id: str
    payload: dict[str, Any]

    @property
    def body(self) -> bytes:
        """As it is sent and signed."""
        return json.dumps(self.payload).encode()

    def headers(self, at: datetime, *secrets: str) -> dict[str, str]:
        """What comes with it at a try made then."""
        return {
            "Content-Type": "application/json; charset=utf-8",
            "recurly-notification-id": self.id,
            "recurly-signature": signature(self.body, at, *secrets),
        }


def signature(body: bytes, at: datetime, *secrets: str) -> str:
    """`ts,hex[,hex…]`: Unix milliseconds, and an HMAC per secret (two while one replaces another)."""
    stamp = str(int(at.timestamp() * 1000))
    signed = stamp.encode() + b"." + body
    return ",".join([stamp, *(hmac.new(each.encode(), signed, sha256).hexdigest() for each in secrets)])


def notice(site_id: str, about: Subscription | Usage, event: str, at: datetime) -> Notice:
    """An event of a subscription or of a usage record."""
    payload: dict[str, Any] = {
        "id": about.id,
        "object_type": type(about).__name__.lower(),
        "site_id": site_id,
        "event_type": event,
        "event_time": at.strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    if isinstance(about, Subscription):
        payload["uuid"] = about.uuid
    else:
        payload |= {"subscription_uuid": about.subscription.uuid, "add_on_code": about.add_on.add_on.code}
    return Notice(uuid4().hex, payload)
