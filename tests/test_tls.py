"""TLS by certificate files: what is taken, what is refused, and how a renewed one comes into effect."""

import shutil
import ssl
from pathlib import Path

import pytest
from receiving import certificate, receiving, request

from billingd import tls
from billingd.reception import Limits
from billingd.reload import Reloader
from billingd.settings import ConfigurationError, Settings, load
from billingd.store.engine import Store

pytestmark = pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)


def configured(cert: str, key: str) -> Settings:
    names = {"BILLINGD_WEBHOOKS__TLS_CERT": cert, "BILLINGD_WEBHOOKS__TLS_KEY": key}
    return load(None, {name: value for name, value in names.items() if value}).settings


def trusting(*certificates: str) -> ssl.SSLContext:
    made = ssl.create_default_context()
    made.load_verify_locations(cadata="".join(Path(one).read_text() for one in certificates))
    return made


async def test_webhooks_come_encrypted_and_a_renewed_certificate_is_taken(
    store: Store, tmp_path: Path
) -> None:
    """Without a restart; one that does not fit its key is refused and the old one stays."""
    cert, key = certificate(tmp_path, "in-use")
    other_cert, other_key = certificate(tmp_path, "renewed")
    old, new = trusting(cert), trusting(other_cert)
    settings = configured(cert, key)
    async with receiving(store, tls=tls.context(settings.webhooks)) as door:
        reloader = Reloader(
            settings, lambda: settings, lambda now: door.reception.use_tls(tls.context(now.webhooks))
        )

        async def taken(trust: ssl.SSLContext) -> int:
            caller = await door.call(trust)
            await caller.say(request())
            return (await caller.answer()).status

        assert await taken(old) == 202
        shutil.copy(other_cert, cert)
        await reloader.run_once()  # half of the renewal is there
        assert await taken(old) == 202
        shutil.copy(other_key, key)
        await reloader.run_once()
        assert await taken(new) == 202
        with pytest.raises(ssl.SSLCertVerificationError):
            await taken(old)


async def test_what_is_not_tls_is_hung_up_on_and_so_is_a_slow_handshake(store: Store, tmp_path: Path) -> None:
    """A handshake has the time of a head, and counts as a connection meanwhile."""
    settings = configured(*certificate(tmp_path, "in-use"))
    limits = Limits(head_seconds=0.2, connections=4)
    async with receiving(store, limits, tls=tls.context(settings.webhooks)) as door:
        plain = await door.call()
        await plain.say(request())
        assert b"202" not in await plain.ended()
        silent = [await door.call() for _ in range(10)]
        for caller in silent:
            assert await caller.ended() == b""
        assert door.reception.connections <= 4


def test_files_that_cannot_be_used_are_named_with_their_key(tmp_path: Path, store_url: str) -> None:
    """One key without the other, a missing file, nonsense, a key that is another's, a locked key."""
    cert, key = certificate(tmp_path, "in-use")
    _, other_key = certificate(tmp_path, "other")
    nonsense = tmp_path / "nonsense"
    nonsense.write_text("nonsense")
    for one, other in ((cert, ""), ("", key)):
        with pytest.raises(ConfigurationError, match=r"webhooks\.tls_(key|cert): is needed beside"):
            configured(one, other)
    expected = {
        (cert, str(tmp_path / "gone")): "webhooks.tls_key: cannot be read",
        (str(tmp_path), key): "webhooks.tls_cert: cannot be read",
        (cert, other_key): f"webhooks.tls_key: {other_key} is not the key of {cert}",
        (str(nonsense), key): "webhooks.tls_cert: ",
        (cert, str(nonsense)): "webhooks.tls_cert: ",
        (key, key): "webhooks.tls_cert: ",
    }
    for (one, other), message in expected.items():
        [fault] = tls.faults(configured(one, other).webhooks)
        assert str(fault).startswith(message), fault
    assert tls.faults(configured(cert, key).webhooks) == []
    assert tls.faults(configured("", "").webhooks) == []
