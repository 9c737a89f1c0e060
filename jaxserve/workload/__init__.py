"""Workloads: requests with arrivals, clients and prefixes, for load client and simulator."""
