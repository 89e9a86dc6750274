"""How a computation runs: device and dtype, precision, threads, offload, resume files, progress."""
