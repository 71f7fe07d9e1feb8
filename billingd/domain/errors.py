"""Errors, named by what the caller does next."""

from datetime import timedelta

from billingd.domain.privacy import KNOWN


class BillingdError(Exception):
    """Anything billingd raises on purpose; its text is written for an operator, and has no secret in it.

    Far sides, drivers and parsers quote what they were given, and errors are logged, kept, shown and sent.
    """

    def __str__(self) -> str:
        return KNOWN.without(super().__str__())


class Retryable(BillingdError):
    """Try again later: nothing happened, or what happened can be asked again.

    `retry_after` is the far side's own wish (Retry-After, rate-limit reset), or None.
    """

    def __init__(self, message: str, *, retry_after: timedelta | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Illegible(Retryable):
    """A read was answered with success, and the answer cannot be understood: soon it says the same again."""


class Unknown(Retryable):
    """A write got no usable answer: it may or may not have happened.

    `replayed` is True when the far side returned a stored failure, so that the same key cannot help.
    """

    def __init__(self, message: str, *, retry_after: timedelta | None = None, replayed: bool = False) -> None:
        super().__init__(message, retry_after=retry_after)
        self.replayed = replayed


class Settling(Unknown):
    """Nothing was sent: an earlier request may still take effect, and `retry_after` says until when.

    Waiting it out is no attempt.
    """


class NotDone(Retryable):
    """A write was clearly refused for now (rate limit, a change in progress): safe to send anew."""


class Conflict(Retryable):
    """The resource changed since it was read, and nothing was written: read it again, then decide again."""


class Replaced(Conflict):
    """The name belongs to another resource by now, made anew under it."""


class ReadingBack(Retryable):
    """After a restore the daemon has to read Recurly back first; nobody else does."""


class Misconfigured(Retryable):
    """The far side refuses us altogether (credentials, permissions): waits until somebody mends it."""


class Permanent(BillingdError):
    """The same call can never succeed; a person must look."""


class Refused(Permanent):
    """A far side rejected this payload for good.

    `code` is the far side's own word for it (such as Recurly's `validation`), `params` the fields it named.
    """

    def __init__(self, message: str, *, code: str = "", params: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.code = code
        self.params = params


class NotFound(Permanent):
    """The far side says clearly that there is no such thing."""


class Gone(Permanent):
    """What was asked for is no longer kept: begin anew, after looking at everything.

    `max_sequence` is the newest position the far side named, or None.
    """

    def __init__(self, message: str, *, max_sequence: int | None = None) -> None:
        super().__init__(message)
        self.max_sequence = max_sequence


class Rejected(BillingdError):
    """A webhook delivery that is not accepted: nothing of it is kept.

    `status` is the HTTP status that says why, `code` its machine-readable name.
    """

    def __init__(self, message: str, *, status: int, code: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class StoreBusy(BillingdError):
    """Another process holds this store, or the store is newer than this program."""


class StoreHeld(StoreBusy):
    """Another process has the store's lock."""
