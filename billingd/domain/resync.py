"""Amplify, the links and Recurly side by side: the actions that bring them together again, and no others.

Each step only asks the handler of an event that may have been lost: it reads the resource again by its name,
and judges by itself what an absence means before anything is ended. Nothing is asked for a subject that has
an action waiting already, nor for one whose last action is a dead letter (that one is an operator's), nor for
what is held for the very reason that a new attempt would find.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal, Protocol

from billingd.domain.agreement import (
    Uncharged,
    add_on_differences,
    costs_nothing,
    differences,
    not_listed,
    uncharged,
    unseen,
)
from billingd.domain.attempts import Action
from billingd.domain.billing import OUR_ACCOUNTS, BilledAddOn, BilledPlan, BilledSubscription
from billingd.domain.catalog import BILLING_SYSTEM, Product, ProductPlan, Quota, Subscription
from billingd.domain.charges import Prices
from billingd.domain.delivery import MISSING, OVER, PAUSED
from billingd.domain.events import (
    PROVISION_PLAN,
    PROVISION_SUBSCRIPTION,
    attach_action,
    plan_action,
    product_action,
    refresh_action,
    subscription_action,
)
from billingd.domain.pricing import Inexpressible, NotOurs, PlanSpec, translate

ENDED: Final = frozenset({"archived", "migrated"})
"""States of a subscription that Amplify no longer serves."""

ABSENT_MIN: Final = 3
ABSENT_SHARE: Final = 10
"""How many may be absent at once before a person is asked: three, or one in ten; and fewer than half."""

EXAMPLES: Final = 20

CLOSABLE: Final = "what is held of it can be closed"

REACTIVATED: Final = "is over at Amplify, and was reactivated at Recurly after its end"

MASS_ABSENCE: Final = "mass_absence"
ABSENCE: Final = "resync:absence"
"""Kind and subject of the held item that says that much is missing at Amplify at once."""

ASKING: Final = (PROVISION_PLAN, PROVISION_SUBSCRIPTION)
"""The kinds of action that may wait until it is known whether what is absent was deleted."""

NATIVE_BILLING: Final = "native_billing"
"""Kind of the held item that says that a Marketplace charges by itself."""

Translated = PlanSpec | Inexpressible | NotOurs
Op = Literal["+", "~", "-"]
What = Literal["product", "plan", "subscription"]


@dataclass(frozen=True, slots=True)
class Step:
    """One thing to do: `+` create, `~` change, `-` end. `absent`: only because Amplify lists it no more."""

    op: Op
    what: What
    id: str
    name: str
    title: str
    reason: str
    action: Action
    absent: bool = False


class Missing(Protocol):
    """Something that Amplify shows no more."""

    @property
    def what(self) -> str: ...
    @property
    def id(self) -> str: ...
    @property
    def title(self) -> str: ...


class LinkedPlan(Protocol):
    """A linked product plan, as the store has it."""

    @property
    def plan_id(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def product_name(self) -> str: ...
    @property
    def plan_code(self) -> str: ...
    @property
    def state(self) -> str: ...


class LinkedAddOn(Protocol):
    """A linked quota."""

    @property
    def quota_id(self) -> str: ...
    @property
    def plan_id(self) -> str: ...
    @property
    def add_on_code(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def prices(self) -> Prices | None: ...


class LinkedSubscription(Protocol):
    """A linked subscription."""

    @property
    def subscription_id(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def plan_id(self) -> str: ...
    @property
    def uuid(self) -> str: ...
    @property
    def state(self) -> str: ...
    @property
    def billed_state(self) -> str | None: ...


@dataclass(frozen=True, slots=True)
class Listed:
    """What Amplify has. `quotas` by plan id: a plan that is not in it was not, or could not be, read."""

    products: tuple[Product, ...]
    plans: tuple[ProductPlan, ...]
    quotas: Mapping[str, tuple[Quota, ...]]
    subscriptions: tuple[Subscription, ...]
    unread: frozenset[str] = frozenset()
    """Ids of what is there but could not be understood: none of them is absent."""

    @property
    def labelled(self) -> frozenset[str]:
        """Names of the products that are billed here."""
        return frozenset(one.name for one in self.products if one.billing_system == BILLING_SYSTEM)


@dataclass(frozen=True, slots=True)
class Standing:
    """A held item that stands: its kind, why, and the name of what it is about."""

    kind: str
    reason: str
    name: str
    add_ons: frozenset[str] = frozenset()
    """Codes of those that a subscription is held for."""


@dataclass(frozen=True, slots=True)
class Known:
    """What the store has. `held` and `dead` are by subject, as `waiting` is."""

    plans: Sequence[LinkedPlan]
    add_ons: Mapping[str, LinkedAddOn]
    """By quota id."""
    subscriptions: Mapping[str, LinkedSubscription]
    before: frozenset[str]
    """Ids that were linked before Amplify was listed: others may be missing there for being too new."""
    waiting: frozenset[str] = frozenset()
    dead: Mapping[str, str] = field(default_factory=dict)
    held: Mapping[str, Standing] = field(default_factory=dict)
    """Whatever is held of a plan or subscription as such, and of a subscription's add-ons."""
    gone: frozenset[str] = frozenset()
    """Ids of the linked quotas that are known to be deleted."""


@dataclass(frozen=True, slots=True)
class Billed:
    """What Recurly has: plans and add-ons by plan code, and the subscriptions that are live."""

    plans: Mapping[str, BilledPlan]
    add_ons: Mapping[str, tuple[BilledAddOn, ...]]
    subscriptions: tuple[BilledSubscription, ...]


@dataclass(frozen=True, slots=True)
class Compared:
    """`steps` are to be done, subscriptions last; `notes` name what is left to an operator."""

    steps: tuple[Step, ...]
    notes: tuple[str, ...]
    missing: tuple[Step, ...] = ()
    """Whatever is not at Amplify any more, with what waits already or has a dead letter."""
    dead_letters: int = 0
    """How many steps a dead letter is in the way of."""


def over(subscription: Subscription) -> bool:
    """Whether Amplify no longer serves it."""
    return subscription.deleting or subscription.approval == "rejected" or subscription.state in ENDED


def to_translate(plan: ProductPlan, labelled: Iterable[str]) -> bool:
    """Whether the plan's quotas decide anything."""
    return plan.product_name in labelled and not plan.deleting and plan.state in {"active", "deprecated"}


def compare(amplify: Listed, known: Known, recurly: Billed, *, because: str) -> Compared:
    """Every step that is needed, as things stand on the three sides. `because` makes the actions' keys."""
    found = _Comparison(amplify, known, recurly, because)
    steps: list[Step] = []
    notes: list[str] = []
    missing: list[Step] = []
    for step in (*found.product_steps(), *found.plan_steps(), *found.subscription_steps()):
        if step.absent and step.op == "-":
            missing.append(step)
        if step.action.subject in known.waiting:
            continue
        if (letter := known.dead.get(step.action.subject)) is not None:
            notes.append(f"{step.what} {step.title} ({step.id}): {step.reason}, but {letter}")
        else:
            steps.append(step)
    return Compared(tuple(steps), (*notes, *found.notes), tuple(missing), len(notes))


def too_many(gone: int, linked: int) -> bool:
    """Whether more is absent at once, of so many linked, than who may have lost a right should be trusted.

    An account that loses a role sees less (amplify.md 1.1), and to it that looks like deletions. More than
    one that are half of all are too much, however few there were.
    """
    return gone > max(ABSENT_MIN, linked / ABSENT_SHARE) or (gone > 1 and 2 * gone >= linked)


def is_mass(absent: Iterable[Missing], *, plans: int, subscriptions: int) -> bool:
    """Whether that is so of the plans or of the subscriptions among these."""
    counts = Counter(one.what for one in absent)
    return too_many(counts["plan"], plans) or too_many(counts["subscription"], subscriptions)


def mass_reason(absent: Sequence[Missing], *, examples: int = EXAMPLES) -> str:
    """What is said of what is absent and not known to be deleted, naming so many of it."""
    counts = [(sum(one.what == what for one in absent), what) for what in ("subscription", "plan")]
    told = " and ".join(f"{number} {what}(s)" for number, what in counts if number)
    named = ", ".join(f"{one.title} ({one.id})" for one in absent[-examples:])
    return (
        f"{told} that are linked are not found at Amplify any more, and no event says that they were "
        "deleted. That is what it looks like when the service account loses a right, so none of them is "
        "ended. Give it back its role (Engage Admin), or release this if they were really deleted, which "
        f"ends just these: {named}{', and others' if len(absent) > examples else ''}."
    )


class _Comparison:
    """The three sides, indexed."""

    def __init__(self, amplify: Listed, known: Known, recurly: Billed, because: str) -> None:
        self._amplify = amplify
        self._known = known
        self._recurly = recurly
        self._because = because
        self._labelled = amplify.labelled
        self.notes: list[str] = []
        self._linked_plans = {link.plan_id: link for link in known.plans}
        self._plans = {plan.id: plan for plan in amplify.plans}
        self._live = {one.uuid: one for one in recurly.subscriptions}
        self._names = {one.name for one in known.subscriptions.values()}
        self._add_ons: defaultdict[str, list[LinkedAddOn]] = defaultdict(list)
        for add_on in known.add_ons.values():
            self._add_ons[add_on.plan_id].append(add_on)
        self._unseen = {
            plan_id: unseen(quotas, self._add_ons[plan_id], known.gone)
            for plan_id, quotas in amplify.quotas.items()
            if quotas  # that it has none at all is said of the plan
        }
        self._specs = {
            plan.id: translate(plan, amplify.quotas[plan.id])
            for plan in amplify.plans
            if plan.id in amplify.quotas
            and to_translate(plan, self._labelled)
            and not self._unseen.get(plan.id)
        }
        self._codes = {link.plan_id: self._wanted(link.plan_id) for link in known.plans}

    # Products and plans.

    def product_steps(self) -> Iterator[Step]:
        """Labels that came or went: what is labelled now is found with its plans."""
        linked = {link.product_name for link in self._known.plans if link.state != "removed"}
        for product in self._amplify.products:
            item = self._known.held.get(f"product:{product.name}")
            labelled = product.name in self._labelled
            if not labelled and product.name in linked and item is None:
                reason = "is not labelled any more, and plans of it are linked; they go on being billed"
            elif item is not None and (labelled or product.name not in linked):
                reason = f"{'is labelled again' if labelled else 'has no linked plan any more'}: {CLOSABLE}"
            else:
                continue
            yield self._product(product.id, product.name, product.title, reason)
        names = {product.name for product in self._amplify.products}
        for subject, item in self._known.held.items():
            if subject.startswith("product:") and item.name not in names:
                reason = f"is gone at Amplify: {CLOSABLE}"
                yield replace(self._product("", item.name, item.name, reason), absent=True)

    def _product(self, id_: str, name: str, title: str, reason: str) -> Step:
        action = product_action(name, id_ or None, because=self._because)
        return Step("~", "product", id_ or name, name, title, reason, action)

    def plan_steps(self) -> Iterator[Step]:
        names = set()
        for plan in self._amplify.plans:
            names.add(plan.name)
            link = self._linked_plans.get(plan.id)
            link = None if link is None or link.state == "removed" else link
            needed = self._new_plan(plan) if link is None else self._linked_plan(plan, link)
            if needed is not None:
                yield self._plan(needed[0], plan.id, plan.name, plan.title, needed[1])
        for link in self._known.plans:
            here = link.plan_id in self._plans or link.plan_id in self._amplify.unread
            if link.state != "removed" and not here and link.plan_id in self._known.before:
                reason = "is not listed at Amplify any more"
                yield self._plan("-", link.plan_id, link.name, link.title, reason, absent=True)
                names.add(link.name)
        for subject, item in self._known.held.items():
            if subject.startswith("plan:") and item.name not in names and not self._amplify.unread:
                reason = f"is gone at Amplify: {CLOSABLE}"
                yield self._plan("~", item.name, item.name, item.name, reason, absent=True)

    def _plan(self, op: Op, id_: str, name: str, title: str, reason: str, *, absent: bool = False) -> Step:
        known_id = None if id_ == name else id_
        action = plan_action(name, known_id, because=self._because)
        return Step(op, "plan", id_, name, title, reason, action, absent)

    def _new_plan(self, plan: ProductPlan) -> tuple[Op, str] | None:
        """What to do about a plan that is not linked."""
        item = self._known.held.get(f"plan:{plan.name}")
        spec = self._specs.get(plan.id)
        if (why_not := self._needs_no_link(plan, spec)) is not None:
            return None if item is None else ("~", f"{why_not}: {CLOSABLE}")
        if spec is None:
            return "+", f"{plan.state} and not linked; its quotas cannot be read"
        if isinstance(spec, NotOurs) or self._stands(item, spec):
            return None
        if isinstance(spec, Inexpressible):
            return "+", f"{plan.state} and not linked; it will be held: {spec.reasons[0]}"
        changed = f"{plan.state} and not linked"
        return "+", changed if item is None else f"held as {item.kind}, and that has changed"

    def _needs_no_link(self, plan: ProductPlan, spec: Translated | None) -> str | None:
        """Why a plan that is not linked needs no link; None when it does."""
        if plan.deleting:
            return "is being deleted"
        if plan.product_name not in self._labelled:
            return "is of a product that is not labelled"
        if plan.state == "deprecated" and not self._at_recurly(spec):
            return "is deprecated, and nobody's yet"
        if plan.state not in {"active", "deprecated"}:
            return f"is {plan.state}"
        return spec.reason if isinstance(spec, NotOurs) else None

    def _at_recurly(self, spec: Translated | None) -> bool:
        return isinstance(spec, PlanSpec) and spec.code in self._recurly.plans

    def _linked_plan(self, plan: ProductPlan, link: LinkedPlan) -> tuple[Op, str] | None:
        """What to do about a plan that is linked."""
        if plan.deleting or plan.state == "archived":
            return "-", "is being deleted at Amplify" if plan.deleting else "is archived at Amplify"
        if plan.state not in {"active", "deprecated"}:
            return None
        if missing := self._unseen.get(plan.id):  # such a list says nothing else
            return "~", not_listed(missing[0])
        said = list(self._deprecated(plan, link) if plan.state == "deprecated" else self._active(plan, link))
        return ("~", "; ".join(said)) if said else None

    def _deprecated(self, plan: ProductPlan, link: LinkedPlan) -> Iterator[str]:
        """What a deprecated plan needs: its prices matter to nobody new any more."""
        item = self._known.held.get(f"plan:{plan.name}")
        if link.state == "active":
            yield "is deprecated at Amplify"
        if item is not None and item.kind != "plan_refused":
            yield CLOSABLE
        spec = self._specs.get(plan.id)
        if isinstance(spec, PlanSpec) and self._at_recurly(spec):
            yield from self._changes(plan, link, spec)

    def _active(self, plan: ProductPlan, link: LinkedPlan) -> Iterator[str]:
        item = self._known.held.get(f"plan:{plan.name}")
        spec = self._specs.get(plan.id)
        if plan.product_name not in self._labelled:
            if item is not None:
                yield CLOSABLE
            return
        if isinstance(spec, NotOurs):
            if item is None or spec.reason not in item.reason:
                yield f"is linked, and will be held: {spec.reason}"
            return
        if spec is None:
            return
        if link.state == "deprecated":
            yield "is active again at Amplify"
        stands = self._stands(item, spec)
        if item is not None and not stands:
            yield f"is held as {item.kind}, and that has changed"
        if isinstance(spec, Inexpressible):
            if item is None:
                yield f"has changed, and cannot be expressed: {spec.reasons[0]}"
            return
        if item is None:
            yield from self._wrong(spec)
        if item is None or not stands or item.kind == "plan_differs":
            yield from self._changes(plan, link, spec)

    def _stands(self, item: Standing | None, spec: PlanSpec | Inexpressible) -> bool:
        """Whether what is held is just what another attempt would find, as far as that can be told.

        What Recurly refused, or a later release holds, is tried again when a person releases it.
        """
        if item is None:
            return False
        if isinstance(spec, Inexpressible):
            return item.kind == "plan_inexpressible" and item.reason == " ".join(spec.reasons)
        if item.kind == "plan_inexpressible":
            return False
        if item.kind == "plan_differs":
            if spec.code not in self._recurly.plans:
                return True
            wrong = self._wrong(spec)
            return bool(wrong) and all(sentence in item.reason for sentence in wrong)
        return True

    def _changes(self, plan: ProductPlan, link: LinkedPlan, spec: PlanSpec) -> Iterator[str]:
        """How the plan and its quotas differ from their links; not those whose prices differ at Recurly."""
        if _one_line(plan.title) != _one_line(link.title):
            yield f'was "{_one_line(link.title)}" before'
        at_recurly = self._recurly.plans.get(spec.code)
        if at_recurly is None or at_recurly.state != "active":
            return  # nothing can be added to it
        there = {add_on.code: add_on for add_on in self._recurly.add_ons.get(spec.code, ())}
        for add_on in spec.add_ons:
            billed = there.get(add_on.code)
            if billed is not None and add_on_differences(add_on, billed):
                continue
            linked = self._known.add_ons.get(add_on.quota_id)
            if linked is None:
                yield f'quota "{add_on.name}" has no add-on yet'
            elif _one_line(linked.title) != _one_line(add_on.name):
                yield f'quota "{add_on.name}" was "{_one_line(linked.title)}" before'
            elif billed is None and spec.code in self._recurly.add_ons:
                self.notes.append(
                    f'plan {plan.title} ({plan.id}): its add-on "{add_on.code}" was removed at Recurly; '
                    "nobody new can subscribe until it is there again"
                )

        priced = {
            one.add_on_code
            for one in self._add_ons[plan.id]
            if one.prices is None or not costs_nothing(one.prices)
        }
        for free in self._uncharged(spec):
            if not free.gone and free.code in priced and not free.differences(there.get(free.code)):
                yield f'quota "{free.title}" costs nothing any more'

    def _wrong(self, spec: PlanSpec) -> list[str]:
        """How Recurly charges otherwise, in the words in which a plan is held for it."""
        plan = self._recurly.plans.get(spec.code)
        if plan is None:
            return [f"Recurly does not list its plan {spec.code}"]
        said = list(differences(spec, plan))
        there = {add_on.code: add_on for add_on in self._recurly.add_ons.get(spec.code, ())}
        for add_on in spec.add_ons:
            if (billed := there.get(add_on.code)) is not None:
                said += add_on_differences(add_on, billed)
        for one in self._uncharged(spec):
            said += one.differences(there.get(one.code))
        return said

    def _uncharged(self, spec: PlanSpec) -> tuple[Uncharged, ...]:
        """The plan's linked add-ons that Amplify charges nothing for."""
        return uncharged(spec, self._amplify.quotas[spec.plan_id], self._add_ons[spec.plan_id])

    def _wanted(self, plan_id: str) -> set[str]:
        """The add-ons that every subscription to a plan is to have."""
        if self._unseen.get(plan_id):
            return set()  # nobody can tell by this list
        codes = {one.add_on_code for one in self._add_ons[plan_id]}
        spec = self._specs.get(plan_id)
        if isinstance(spec, PlanSpec):
            there = {one.code: one for one in self._recurly.add_ons.get(spec.code, ())}
            codes -= {one.code for one in self._uncharged(spec) if not one.belongs(there.get(one.code))}
        return codes

    # Subscriptions.

    def subscription_steps(self) -> Iterator[Step]:
        here = {one.id for one in self._amplify.subscriptions} | self._amplify.unread
        for subscription in self._amplify.subscriptions:
            link = self._known.subscriptions.get(subscription.id)
            needed = self._unlinked(subscription) if link is None else self._linked(subscription, link)
            if needed is not None:
                yield self._subscription(
                    needed[0], subscription.id, subscription.name, subscription.title, needed[1]
                )
            elif link is not None and (other := self._linked_otherwise(subscription, link)) is not None:
                reason, action = other
                yield Step(
                    "~",
                    "subscription",
                    subscription.id,
                    subscription.name,
                    subscription.title,
                    reason,
                    action,
                )
        for link in self._known.subscriptions.values():
            if link.subscription_id in here or link.subscription_id not in self._known.before:
                continue
            if self._reactivated(link):  # that it is over was known when it ended
                yield self._subscription("-", link.subscription_id, link.name, link.title, REACTIVATED)
                continue
            if link.state in {"created", "active"}:
                reason = "is not listed at Amplify any more"
                yield self._subscription(
                    "-", link.subscription_id, link.name, link.title, reason, absent=True
                )
        yield from self._orphans(here)
        for subject, item in self._known.held.items():
            id_ = subject.removeprefix("subscription:")
            unlinked = id_ not in self._known.subscriptions
            if subject.startswith("subscription:") and ":" not in id_ and id_ not in here and unlinked:
                reason = f"is gone at Amplify: {CLOSABLE}"
                yield self._subscription("~", id_, item.name, item.name, reason, absent=True)

    def _subscription(
        self, op: Op, id_: str, name: str, title: str, reason: str, *, absent: bool = False
    ) -> Step:
        action = subscription_action(name, id_, because=self._because)
        return Step(op, "subscription", id_, name, title, reason, action, absent)

    def _unlinked(self, subscription: Subscription) -> tuple[Op, str] | None:
        """What to do about a subscription that is not linked."""
        item = self._known.held.get(f"subscription:{subscription.id}")
        if over(subscription):
            if item is None:
                return None  # one that lives on at Recurly is among the orphans
            return "~", f"is {_end(subscription)} at Amplify: {CLOSABLE}"
        if subscription.approval not in {"pending", "approved"} or item is not None:
            return None
        if subscription.product_name not in self._labelled and not self._moved_here(subscription):
            return None
        if not self._offered(subscription):
            return None
        return "+", f"{subscription.approval} and not linked"

    def _moved_here(self, subscription: Subscription) -> bool:
        """Whether it follows one that was billed here, to a plan that is: the label is for new ones only."""
        plan = self._linked_plans.get(subscription.plan_id or "")
        return plan is not None and plan.state != "removed" and subscription.migrated_from in self._names

    def _offered(self, subscription: Subscription) -> bool:
        """Whether its plan is one that is billed here, linked or about to be."""
        if subscription.plan_id is None:
            return True  # its handler says what is wrong with it
        if subscription.plan_id in self._linked_plans:
            return True
        plan = self._plans.get(subscription.plan_id)
        if plan is None or not to_translate(plan, self._labelled):
            return False
        if plan.state == "deprecated" and subscription.approval != "pending":
            return False  # never linked, and nothing here to bill it by
        return not isinstance(self._specs.get(plan.id), NotOurs)

    def _linked(self, subscription: Subscription, link: LinkedSubscription) -> tuple[Op, str] | None:
        """What to do about a subscription that is linked."""
        if link.state == "ended":
            return self._ended(subscription, link)
        if link.state not in {"created", "active"}:
            return None
        if over(subscription):
            return "-", f"is {_end(subscription)} at Amplify"
        if f"subscription:{subscription.id}" in self._known.held:
            return None
        if link.state == "created" and subscription.approval in {"pending", "approved"}:
            return "~", "exists at Recurly and was not approved yet"
        return None

    def _ended(self, subscription: Subscription, link: LinkedSubscription) -> tuple[Op, str] | None:
        """What to do about one that billingd has ended."""
        stands = f"subscription:{subscription.id}:served" in self._known.held
        if over(subscription):
            if self._reactivated(link):
                return "-", REACTIVATED
            return ("~", f"is {_end(subscription)} at Amplify: {CLOSABLE}") if stands else None
        if stands:
            return None
        if subscription.approval == "approved":
            return "~", "was ended at Recurly, and is served at Amplify again"
        if subscription.approval == "pending":
            return "~", "was ended at Recurly, and asks for approval again"
        return None

    def _reactivated(self, link: LinkedSubscription) -> bool:
        """Whether somebody took its end back at Recurly; one that is only canceled runs out by itself."""
        billed = self._live.get(link.uuid)
        return link.state == "ended" and billed is not None and billed.state == "active"

    def _linked_otherwise(
        self, subscription: Subscription, link: LinkedSubscription
    ) -> tuple[str, Action] | None:
        """What differs at Recurly of a subscription that is linked and stays.

        What is paused may be missing among those that are live, and is known to be.
        """
        if link.state != "active" or over(subscription) or link.subscription_id not in self._known.before:
            return None
        if f"subscription:{subscription.id}" in self._known.held:
            return None
        billed = self._live.get(link.uuid)
        if billed is None:
            if link.billed_state in {*OVER, PAUSED, MISSING}:
                return None
            reason = "is active at Amplify and not among Recurly's live subscriptions: look at it again"
            return reason, refresh_action(link.uuid, because=self._because)
        item = self._known.held.get(f"subscription:{subscription.id}:add_ons")
        asked = frozenset() if item is None else item.add_ons
        lacking = sorted(self._codes.get(link.plan_id, set()) - set(billed.add_on_codes) - asked)
        if not lacking:
            return None
        action = attach_action(link.subscription_id, lacking)
        # the same set may have been put on before, and taken off by somebody since
        action = replace(action, key=f"{action.key}:{self._because}")
        return f"lacks {', '.join(lacking)} of its plan at Recurly", action

    def _orphans(self, here: set[str]) -> Iterator[Step]:
        """Subscriptions that Recurly bills, marked with one that Amplify does not serve, and not linked.

        Only to plans that are or were linked, on an account of Amplify's, with a PO number that can be an
        Amplify id: whatever else there is was none of billingd's making, and is only noted.
        """
        codes = {link.plan_code for link in self._known.plans}
        uuids = {link.uuid for link in self._known.subscriptions.values()}
        served = {one.id: one for one in self._amplify.subscriptions}
        for billed in self._recurly.subscriptions:
            marker = billed.marker
            if marker is None or billed.uuid in uuids or marker in self._known.subscriptions:
                continue
            if billed.plan_code not in codes:
                continue
            if not billed.marked or not billed.account_code.startswith(OUR_ACCOUNTS):
                self.notes.append(
                    f"subscription {billed.uuid} of account {billed.account_code} to {billed.plan_code}: its "
                    f"PO number {marker!r} is none that billingd put there, so nothing is done about it; "
                    "`billingd reconcile` tells of it"
                )
                continue
            subscription = served.get(marker)
            if subscription is not None and not over(subscription):
                continue
            if subscription is None and marker in here:
                continue
            name, title = (
                (marker, billed.uuid) if subscription is None else (subscription.name, subscription.title)
            )
            is_so = "is not listed" if subscription is None else f"is {_end(subscription)}"
            step = self._subscription(
                "-",
                marker,
                name,
                title,
                f"Recurly bills {billed.uuid} for it, and it {is_so} at Amplify",
                absent=subscription is None,
            )
            # nobody here knows of it any more: the handler is told which one it is
            args = {**step.action.args, "uuid": billed.uuid}
            yield replace(step, action=replace(step.action, args=args))


def _end(subscription: Subscription) -> str:
    if subscription.deleting:
        return "being deleted"
    return "rejected" if subscription.approval == "rejected" else str(subscription.state)


def _one_line(title: str) -> str:
    """A title as Recurly can keep it."""
    return " ".join(title.split())[:255]
