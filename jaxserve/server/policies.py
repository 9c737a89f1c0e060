"""`jaxserve policies`: every order by name, with its source, its parameters and its laws."""

from jaxserve.flags import Settings
from jaxserve.schedulers.catalog import ORDERS, describe


def main(settings: Settings) -> int:
    """Print the catalogue; returns the exit code."""
    print("orders (--order, --order_options):")
    for policy in ORDERS.values():
        print()
        print("\n".join(describe(policy)))
    return 0
