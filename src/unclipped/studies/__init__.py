"""Runs that compare arms trained alike, and their reports."""
