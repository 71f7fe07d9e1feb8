"""Every kind of action that the outbox may hold."""

from typing import Final

from billingd.domain.events import (
    ADOPT_SUBSCRIPTION,
    ATTACH_ADD_ONS,
    AUDIT_USAGE,
    END_SUBSCRIPTION,
    PROVISION_PLAN,
    PROVISION_PRODUCT,
    PROVISION_SUBSCRIPTION,
    REFRESH_SUBSCRIPTION,
    REPAIR_USAGE,
    REPORT_USAGE,
    RESYNC,
)
from billingd.domain.notices import NOTIFY_PROVIDER, NOTIFY_SUBSCRIBER

KINDS: Final = frozenset(
    {
        ADOPT_SUBSCRIPTION,
        ATTACH_ADD_ONS,
        AUDIT_USAGE,
        END_SUBSCRIPTION,
        NOTIFY_PROVIDER,
        NOTIFY_SUBSCRIBER,
        PROVISION_PLAN,
        PROVISION_PRODUCT,
        PROVISION_SUBSCRIPTION,
        REFRESH_SUBSCRIPTION,
        REPAIR_USAGE,
        REPORT_USAGE,
        RESYNC,
    }
)
