"""Which worker runs each stage of a request. A library inside each ingress replica; no torch, no KV bytes."""
