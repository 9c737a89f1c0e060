"""Plans over all replicas at once, instead of routing: SCLS and its steps."""
