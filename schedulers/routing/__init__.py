"""Which replica serves a request: one file per policy, pure over what is known of the replicas."""
