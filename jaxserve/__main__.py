"""`python -m jaxserve` is the console script `jaxserve`."""

import sys

from jaxserve.launch import main

sys.exit(main())
