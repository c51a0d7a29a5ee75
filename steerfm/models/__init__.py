"""Models of others as flow maps: their paths, their networks."""
