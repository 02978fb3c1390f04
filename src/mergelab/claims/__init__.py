"""Claims: published scores and recipes, from cards, leaderboards and files."""
