"""Compile a traced function as one native CPU kernel, and start several of them side by side.

Knows how XLA's CPU runtime dispatches work; knows nothing of what the kernels compute. On any
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
import jax.numpy as jnp
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata
from jaxtyping import Array, Float, Int


def one_kernel(function: Callable[..., Any], *operands: Any) -> Any:
    """Call `function(*operands)`, compiled on a CPU as a single kernel on one thread."""

    def body(*operands: Any) -> Any:
        # Everything traced inside would inherit the marks of the call, calls made by jnp included.
        with set_xla_metadata(xla_cpu_small_call="false", inlineable="true"):
            return function(*operands)

    with set_xla_metadata(xla_cpu_small_call="true", inlineable="false"):
        return jax.jit(body)(*operands)


def start_tickets(count: int, *waits_for: Float[Array, "..."]) -> list[Int[Array, ""]]:
    """Return `count` zeros; kernels that each use one of them may run on threads of their own.

    A thread that finishes a thunk goes on with whatever became ready by that, so two kernels that
    wait for the same value run one after the other on one thread. XLA hands a thunk to another
    thread only if it may block, as library dots may. So each kernel waits for a dot of its own,
    tiny and otherwise useless, where the threads can part. They do so only some of the time: on
    two cores a whole slice program used 1.2 to 1.3 of them, 10 % faster than without tickets (jax
    0.10.2); programs of kernels alone stayed on one. `waits_for` names everything the
    kernels wait for that is computed at run time, in arrays of at least 64 numbers: were anything
    else to be ready later than the dots, it would bring the kernels together again.
    """
    seed = sum(x.reshape(-1)[:64].reshape(8, 8).astype(jnp.float32) for x in waits_for)
    # No number is above infinity, NaN included, but no compiler pass looks for that.
    return [(lax.dot(seed + i, seed)[0, 0] > jnp.inf).astype(jnp.int32) for i in range(count)]
