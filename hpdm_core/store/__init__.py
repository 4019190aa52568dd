"""Work by key: stages and their attempts, leases, heartbeats, causes of failure, provenance. Knows no study."""
