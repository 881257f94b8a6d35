"""Evaluation: bits per byte, and what to hold them against."""
