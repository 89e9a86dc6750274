"""Parts of ``experiments/tofu_1000.py``: the rows, the operations, and the columns and bars of the table."""
