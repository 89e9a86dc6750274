"""Methods beside each other: what they are, how they are tuned and run, and the leaderboard of what was measured."""
