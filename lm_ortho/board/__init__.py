"""Sweeps and leaderboards: many models through the same tasks, every result kept, one page at the end."""
