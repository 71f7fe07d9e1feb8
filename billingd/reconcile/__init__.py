"""Reconcile: served (Amplify), recorded (the ledger) and billed (Recurly) side by side, to the unit."""
