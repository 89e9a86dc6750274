"""Boards and sweeps: compares methods, tunes and runs them, and writes the leaderboard of the measurements."""
