"""Networks: backbones by name, their weights, their new heads, and their freeze levels."""
