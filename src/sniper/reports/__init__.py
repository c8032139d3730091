"""Pictures and curves for people to look at."""
