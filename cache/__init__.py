"""Which page holds what: pages, prefix tree, leases, eviction. No tensors, no clock, no I/O."""
