"""Distances between two sets of features, and how sure they are."""
