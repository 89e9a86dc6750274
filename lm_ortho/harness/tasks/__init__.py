"""Task classes for lm-eval, with their documents and aggregations."""
