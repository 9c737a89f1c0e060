"""Many replicas as one server. The router here has no I/O: the simulator drives the same object."""
