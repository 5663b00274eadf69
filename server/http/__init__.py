"""What every route shares: protocol, authentication, errors, event streams."""
