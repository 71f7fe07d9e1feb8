"""Whether an installation would work: every far side, credential, permission, clock and the store.

Only reads, at either side and in the store.
"""

from billingd.doctor.at_daemon import Listens
from billingd.doctor.findings import Finding, State
from billingd.doctor.round import Subject, checks, findings, of_configuration

__all__ = ["Finding", "Listens", "State", "Subject", "checks", "findings", "of_configuration"]
