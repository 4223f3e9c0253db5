"""A simulated shop, and the best possible scores for its shoppers."""
