"""Adapters of one size, split over the blocks in different ways, trained and judged on the same held-out images."""
