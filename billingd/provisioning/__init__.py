"""Makes plans and subscriptions exist at Recurly, one handler per kind of action."""
