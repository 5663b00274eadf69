"""The memory of keys and values: formats, layout, the pool and how much of it there is."""
