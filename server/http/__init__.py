"""The parts that all routes share: protocol, authentication, errors, event streams."""
