"""Parts of ``experiments/tofu_1000.py``: rows, adapters, entries of the table, their cost, and the page."""
