"""Other engines on the workload that jaxserve is measured with. Nothing here imports JAX."""
