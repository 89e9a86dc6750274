"""How computations run: device and dtype, precision, threads, offload, resume files, progress."""
