"""Heads that are solved rather than trained: logistic regression on frozen features."""
