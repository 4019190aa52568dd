"""Stages by key and their attempts, leases, heartbeats, causes of failure, provenance. Independent of studies."""
