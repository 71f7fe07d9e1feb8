"""The sandbox's Amplify: an in-memory tenant, as strict as what is documented of the real one.

`tenant.Tenant` is the state and its operations, `routes.routes` puts it on HTTP.
"""
