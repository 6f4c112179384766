"""Ablations: factors, baseline, designs, and running them."""
