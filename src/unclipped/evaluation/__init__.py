"""Evaluation: tasks declared as data, scorers, intervals, and a resumable runner that keeps raw predictions."""
