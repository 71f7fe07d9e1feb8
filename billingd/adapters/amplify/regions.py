"""Where Amplify's regions answer (amplify.md 1.2)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Region:
    """Where one of Amplify's regions answers."""

    central_url: str
    login_url: str
    platform_url: str


_LOGIN: Final = "https://login.axway.com/auth"
_PLATFORM: Final = "https://platform.axway.com"
REGIONS: Final[Mapping[str, Region]] = {
    "us": Region("https://apicentral.axway.com", _LOGIN, _PLATFORM),
    "eu": Region("https://central.eu-fr.axway.com", _LOGIN, _PLATFORM),
    "ap": Region("https://central.ap-sg.axway.com", _LOGIN, _PLATFORM),
}
"""Login and platform are shared."""
