"""Images: found, decoded once, split, and shown to a network as views."""
