"""What a user buys next: items and categories, ranked."""
