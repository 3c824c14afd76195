"""Scoring systems on the same rows, and saying which is better with what certainty."""
