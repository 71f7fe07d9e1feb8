"""Amplify's JSON -> the domain's values. No I/O; field names and rules are amplify.md 3 and 7."""

from datetime import UTC, datetime
from decimal import Decimal

from billingd.adapters.amplify.encoding import Json, moment_of
from billingd.adapters.amplify.reader import Reader, dig, word
from billingd.domain.catalog import (
    Graduated,
    Loose,
    Marketplace,
    Person,
    PerUnit,
    Pricing,
    Product,
    ProductPlan,
    Quota,
    Strict,
    Subscription,
    Term,
    Tier,
    UnknownPricing,
    Unlimited,
    Volume,
)


def identity(kind: str, raw: Json) -> str:
    """`metadata.id`, the only stable key of a resource (amplify.md 2.5)."""
    return Reader(kind, raw).need_text("metadata.id")


def resource_version(raw: Json) -> str | None:
    """`metadata.resourceVersion`, which Amplify's optimistic lock compares."""
    return Reader("resource", raw).text("metadata.resourceVersion")


def attributes(raw: Json) -> dict[str, str]:
    """The attributes: strings to strings, no nulls (amplify.md 2.5)."""
    found = dig(raw, "attributes")
    if not isinstance(found, dict):
        return {}
    return {
        key: value if isinstance(value, str) else str(value)
        for key, value in found.items()
        if value is not None
    }


def created_at(raw: Json) -> datetime:
    """When it was made, for sorting; the beginning of time when that cannot be told."""
    text = dig(raw, "metadata.audit.createTimestamp")
    try:
        return moment_of(text) if isinstance(text, str) else datetime.min.replace(tzinfo=UTC)
    except ValueError:
        return datetime.min.replace(tzinfo=UTC)


def product(raw: Json) -> Product:
    """A Product (amplify.md 3.1)."""
    read = Reader("Product", raw)
    return Product(
        id=read.need_text("metadata.id"),
        name=read.need_text("name"),
        title=read.text("title") or read.need_text("name"),
        state=word(dig(raw, "state")) or "",
        billing_system=attributes(raw).get("billingSystem"),
    )


def product_plan(raw: Json) -> ProductPlan:
    """A ProductPlan (amplify.md 3.2); a word that is missing becomes "", which is no word we act on."""
    read = Reader("ProductPlan", raw)
    product_name = read.need_text("spec.product")
    return ProductPlan(
        id=read.need_text("metadata.id"),
        name=read.need_text("name"),
        title=read.text("title") or read.need_text("name"),
        product_name=product_name,
        product_id=_reference(raw, "Product", "id", named=product_name),
        state=word(dig(raw, "state")) or "",
        type=read.need_text("spec.type"),
        approval=read.text("spec.subscription.approval") or "",
        currency=read.text("spec.billing.currency"),
        interval=read.text("spec.billing.interval"),
        price=read.number("spec.billing.price") or Decimal(0),
        setup_price=read.number("spec.billing.setup.price") or Decimal(0),
        term=_term(read),
        renewal=read.text("spec.subscription.renewal"),
        cycles=read.whole("spec.subscription.cycles"),
        attributes=attributes(raw),
        resource_version=resource_version(raw),
        deleting=_deleting(raw),
    )


def _term(read: Reader) -> Term | None:
    at = "spec.subscription.interval"
    if dig(read.raw, at) is None:
        return None
    return Term(read.need_text(f"{at}.type"), read.need_whole(f"{at}.length"))


def quota(raw: Json) -> Quota:
    """A Quota (amplify.md 3.3); `unit` is None when its ProductPlanUnit was deleted."""
    read = Reader("Quota", raw)
    return Quota(
        id=read.need_text("metadata.id"),
        name=read.need_text("name"),
        title=read.text("title") or read.need_text("name"),
        unit=read.text("spec.unit"),
        pricing=_pricing(read),
    )


def _pricing(read: Reader) -> Pricing:
    """`spec.pricing`; spellings are amplify.md 3.3, whatever else is an UnknownPricing."""
    at = "spec.pricing"
    kind = read.need_text(f"{at}.type")
    if kind == "unlimited":
        return Unlimited()
    if kind == "perunit":
        return PerUnit(read.need_number(f"{at}.cost"))
    if kind not in ("fixed", "graduated", "volume"):
        return UnknownPricing(kind)
    match kind, (limit := read.need_text(f"{at}.limit.type")):
        case "fixed", "strict":
            return Strict(read.need_whole(f"{at}.limit.value"), read.need_text(f"{at}.interval"))
        case "fixed", "loose":
            return Loose(
                read.need_whole(f"{at}.limit.value"),
                read.need_text(f"{at}.interval"),
                read.number(f"{at}.limit.overages.value"),
            )
        case "graduated", "tiered":
            return Graduated(_tiers(read))
        case "volume", "tiered":
            return Volume(_tiers(read))
    return UnknownPricing(f"{kind} with limit {limit}")


def _tiers(read: Reader) -> tuple[Tier, ...]:
    return tuple(
        Tier(
            each.need_whole("from"),
            each.need_whole("to"),
            each.need_number("cost"),
            each.need_number("flatFee"),
        )
        for each in read.each("spec.pricing.limit.tiers")
    )


def subscription(raw: Json) -> Subscription:
    """A Subscription (amplify.md 3.5); `approval` is "" until Amplify has set it."""
    read = Reader("Subscription", raw)
    plan_name = (
        read.text("spec.plan.name") if isinstance(dig(raw, "spec.plan"), dict) else read.text("spec.plan")
    )
    plan_name = plan_name or read.need_text("spec.plan.name")
    owner = "marketplace.resource.owner"
    return Subscription(
        id=read.need_text("metadata.id"),
        name=read.need_text("name"),
        title=read.text("title") or read.need_text("name"),
        plan_name=plan_name,
        plan_id=_reference(raw, "ProductPlan", "id", named=plan_name),
        product_name=read.need_text("spec.product"),
        approval=word(dig(raw, "approval")) or "",
        state=word(dig(raw, "state")),
        state_at=read.moment("state.when.timestamp"),
        owner_user_id=read.text(f"{owner}.user.id"),
        owner_team_id=read.text(f"{owner}.id") if dig(raw, f"{owner}.type") in (None, "team") else None,
        owner_org_id=read.text(f"{owner}.organization.id"),
        created_by=read.text("marketplace.resource.metadata.createUserId")
        or read.text("metadata.audit.createUserId"),
        marketplace_id=read.text("marketplace.name") or _reference(raw, "Marketplace", "name"),
        migrated_from=word(dig(raw, "references.subscription")) or _reference(raw, "Subscription", "name"),
        attributes=attributes(raw),
        resource_version=resource_version(raw),
        deleting=_deleting(raw),
    )


def marketplace(raw: Json) -> Marketplace:
    """A Marketplace (amplify.md 3.7)."""
    read = Reader("Marketplace", raw)
    name = read.need_text("name")
    return Marketplace(
        name=name, title=read.text("title") or name, payment_type=read.text("billing.payment.type")
    )


def person(raw: Json) -> Person:
    """A user of Amplify's platform (amplify.md 7); the guid goes before PLAT's `_id`."""
    read = Reader("user", raw)
    full = " ".join(part for part in (read.text("firstname"), read.text("lastname")) if part)
    return Person(
        id=read.text("guid") or read.text("_id") or read.need_text("guid"),
        name=full or read.text("name") or read.text("username") or "",
        email=read.text("email"),
    )


def _deleting(raw: Json) -> bool:
    return dig(raw, "metadata.state") == "DELETING"


def _reference(raw: Json, kind: str, field: str, *, named: str | None = None) -> str | None:
    """A field of the reference to a `kind`; of several, the one with that name (amplify.md 2.5)."""
    rows = dig(raw, "metadata.references")
    found = (
        [row for row in rows if isinstance(row, dict) and row.get("kind") == kind]
        if isinstance(rows, list)
        else []
    )
    exact = [row for row in found if row.get("name") == named]
    for row in exact or (found if len(found) == 1 else []):
        if isinstance(value := row.get(field), str) and value:
            return value
    return None
