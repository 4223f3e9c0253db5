"""Judge a model: metrics, contenders, comparisons and reports."""
