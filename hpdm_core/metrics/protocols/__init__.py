"""Protocols of published numbers as records, by which numbers can be compared."""
