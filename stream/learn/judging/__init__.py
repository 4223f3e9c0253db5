"""How good a model is: metrics, contenders, comparisons and their reports."""
