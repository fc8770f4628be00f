"""Offline analysis of a run: numpy only."""
