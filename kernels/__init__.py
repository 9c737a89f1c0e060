"""Array code: jax and Pallas only. Knows no request, model or server."""
