"""What to compute next: the scheduler, the engine around it and the clients to it."""
