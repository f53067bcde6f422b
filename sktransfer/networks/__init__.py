"""Networks by name: where they come from, their weights, how they run."""
