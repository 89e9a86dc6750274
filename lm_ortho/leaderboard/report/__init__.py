"""The leaderboard as HTML, Markdown, CSV and terminal tables."""
