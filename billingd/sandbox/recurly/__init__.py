"""A local Recurly, API v2021-02-25: as strict as the real one, and where that is not known, stricter."""
