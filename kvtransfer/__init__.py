"""Moving KV between processes: geometry, leases, transports, connector. No Ray, no model knowledge."""
