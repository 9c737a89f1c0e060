"""Compile a traced function as one native CPU kernel.

Knows how XLA's CPU runtime dispatches work; knows nothing of what the kernel computes. On any
other platform, or in a release that drops the attribute, the same program runs and gives the same
numbers: only the speed differs.

XLA:CPU runs a program as *thunks*, one per fusion, and each loop iteration starts its thunks anew.
An attention loop with a dozen small steps per page spends its time in dispatch and in copying
pages between thunks. A call marked `xla_cpu_small_call` is compiled as a whole instead, loops
included, into one LLVM function: a loop iteration then costs nanoseconds, and a page is read from
the pool straight into registers. The price is that inside such a kernel only plain loops and
elementwise work are allowed: dots and large reductions become library calls, which it cannot make.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.xla_metadata import set_xla_metadata


def one_kernel(function: Callable[..., Any], *operands: Any) -> Any:
    """Call `function(*operands)`, compiled on a CPU as a single kernel on one thread."""

    def body(*operands: Any) -> Any:
        # Everything traced inside would inherit the marks of the call, calls made by jnp included.
        with set_xla_metadata(xla_cpu_small_call="false", inlineable="true"):
            return function(*operands)

    with set_xla_metadata(xla_cpu_small_call="true", inlineable="false"):
        return jax.jit(body)(*operands)
