"""Training: the one trainer, what it is fed, and what it leaves on disk."""
