"""The lm-eval tasks: task classes, their documents and their aggregations."""
