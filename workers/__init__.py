"""A worker: one engine plus a set of roles."""
