"""What billingd remembers: statements, one file per table."""
