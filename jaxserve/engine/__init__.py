"""One replica: a core without I/O, executors that run its plans, a driver that joins the two."""
