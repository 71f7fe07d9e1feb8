"""Accounts: created once by code, closed and opened again."""

from billingd.sandbox.recurly import schemas
from billingd.sandbox.recurly.billing import bring_up
from billingd.sandbox.recurly.checks import TAKEN, check_custom_fields
from billingd.sandbox.recurly.errors import invalid, unprocessable
from billingd.sandbox.recurly.fields import Body
from billingd.sandbox.recurly.lifecycle import cancel
from billingd.sandbox.recurly.model import Account
from billingd.sandbox.recurly.state import State


def create_account(state: State, body: Body) -> Account:
    """A new account; the code is unique and stays (4.5)."""
    given = schemas.ACCOUNT_CREATE.read(body)
    if given["code"] in state.account_by_code:
        raise invalid(("code", TAKEN))
    return new_account(state, given)


def new_account(state: State, given: Body) -> Account:
    """An account from a checked body."""
    check_custom_fields(state, given)
    account = Account(**state.stamps(), code=given["code"], given=given)
    state.accounts[account.id] = state.account_by_code[account.code] = account
    return account


def update_account(state: State, account: Account, body: Body) -> Account:
    """Everything but the code."""
    given = schemas.ACCOUNT_UPDATE.read(body)
    check_custom_fields(state, given)
    account.given |= given
    state.touch(account)
    return account


def deactivate_account(state: State, account: Account) -> Account:
    """Closes it: its active subscriptions are canceled and run to the end of their cycle."""
    if account.deleted_at:
        raise unprocessable("Account may already be inactive")
    for subscription in account.subscriptions:
        bring_up(state, subscription)
        if subscription.status in {"active", "future"}:
            cancel(state, subscription, {"timeframe": "bill_date"})
    account.deleted_at = state.now()
    account.billing_info = False
    state.touch(account)
    return account


def reactivate_account(state: State, account: Account) -> Account:
    """Opens a closed account again."""
    if not account.deleted_at:
        raise unprocessable("Account may already be active")
    account.deleted_at = None
    state.touch(account)
    return account
