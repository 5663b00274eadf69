"""The key/value cache: pages, prefix tree, leases, eviction. No tensors, no clock, no I/O."""
