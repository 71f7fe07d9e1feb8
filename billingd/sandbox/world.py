"""Everything the sandbox is made of, for the control interface to reach."""

import asyncio
from collections import Counter
from dataclasses import dataclass, field

from billingd.sandbox.amplify.hooks import Webhooks
from billingd.sandbox.amplify.tenant import Tenant
from billingd.sandbox.clock import SandboxClock
from billingd.sandbox.faults import Faults
from billingd.sandbox.mailbox import Mailbox
from billingd.sandbox.recurly.hooks import Notifier
from billingd.sandbox.recurly.site import Site


@dataclass(frozen=True, slots=True)
class World:
    """Both far sides, the clock between them, and what goes wrong."""

    clock: SandboxClock
    tenant: Tenant
    webhooks: Webhooks
    site: Site
    faults: Faults
    notifier: Notifier
    mailbox: Mailbox = field(default_factory=Mailbox)
    calls: Counter[str] = field(default_factory=Counter)
    stop: asyncio.Event = field(default_factory=asyncio.Event)
