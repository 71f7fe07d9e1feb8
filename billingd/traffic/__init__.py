"""Turns traffic into usage records, and usage records into Recurly usage."""
