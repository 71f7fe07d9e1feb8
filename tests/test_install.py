"""`make install`, with a stand-in for Python that makes no environment: what lies where, and for whom."""

import os
import subprocess
from pathlib import Path

from service_manager import ROOT

PYTHON = """#!/bin/sh
case "$*" in
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && echo "#!$3/bin/python" > "$3/bin/billingd" &&
    touch "$3/pyvenv.cfg" ;;
  *hatchling*) mkdir -p build/install/wheel && touch build/install/wheel/billingd.whl ;;
  "-m billingd man") echo '.TH BILLINGD 1' ;;
esac
"""


def test_what_is_installed_can_be_read_by_the_services_user_and_secrets_cannot(tmp_path: Path) -> None:
    """Also where root makes files for itself only; the manual page is there too."""
    checkout, root = tmp_path / "checkout", tmp_path / "root"
    (checkout / ".ci").mkdir(parents=True)
    for name in ("Makefile", "requirements.lock", "systemd", ".ci/locked"):
        (checkout / name).symlink_to(ROOT / name)
    python = checkout / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    done = subprocess.run(
        ["make", "install", f"PYTHON={python}", f"DESTDIR={root}"],
        cwd=checkout,
        env={name: value for name, value in os.environ.items() if not name.startswith("MAKE")},
        umask=0o077,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = {str(path.relative_to(root)): path for path in root.rglob("*")}
    assert found.keys() >= {
        "usr/local/lib/billingd/bin/billingd",
        "usr/local/lib/systemd/system/billingd.service",
        "usr/local/lib/systemd/system/billingd.socket",
        "usr/local/share/man/man1/billingd.1",
        "etc/billingd/billingd.toml",
    }
    assert found["usr/local/share/man/man1/billingd.1"].read_text() == ".TH BILLINGD 1\n"
    assert found.pop("etc/billingd/secrets").stat().st_mode & 0o777 == 0o700
    for name, path in found.items():
        wanted = 0o555 if path.is_dir() else 0o444
        assert path.is_symlink() or path.stat().st_mode & wanted == wanted, name
