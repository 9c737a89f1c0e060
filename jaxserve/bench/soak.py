"""Many requests, many of them abandoned: does the server keep its memory and give its pages back?

Reads the resident size of front end and engine (Linux) after the first requests and at the end.
"""

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jaxserve.client import AsyncClient
from jaxserve.request import SamplingParams


@dataclass(frozen=True, slots=True)
class SoakResult:
    """Resident bytes of all server processes, and pages at the end."""

    num_requests: int
    num_aborted: int
    early_bytes: int
    late_bytes: int
    pages_leased: int
    pages_total: int

    @property
    def growth(self) -> float:
        """Share by which the resident size grew after the early reading."""
        return self.late_bytes / self.early_bytes - 1


async def soak(
    target: str,
    server_pid: int,
    *,
    num_requests: int,
    early: int,
    concurrency: int,
    seed: int,
    progress: Callable[[int], None],
) -> SoakResult:
    """Run `num_requests` requests, about a third of them left after some chunks."""
    rng, done, aborted = random.Random(seed), 0, 0
    turnstile = asyncio.Semaphore(concurrency)
    early_bytes = 0

    async def one(client: AsyncClient, number: int) -> None:
        nonlocal done, aborted, early_bytes
        leave_after = rng.choice([0, 1, 3]) if rng.random() < 0.33 else None
        params = SamplingParams(max_tokens=rng.randint(1, 64), seed=number, n=rng.choice([1, 1, 2]))
        prompt = [rng.randrange(1, 200) for _ in range(rng.randint(1, 120))]
        async with turnstile:
            stream = client.generate(prompt, sampling=params)
            chunks = 0
            async for _ in stream:
                chunks += 1
                if leave_after is not None and chunks > leave_after:
                    aborted += 1
                    break
            await stream.aclose()
        done += 1
        progress(done)
        if done == early:
            early_bytes = resident_bytes(server_pid)

    async with AsyncClient(target) as client:
        await asyncio.gather(*(one(client, number) for number in range(num_requests)))
        await asyncio.sleep(1.0)  # the slices in flight of the last aborts
        late_bytes = resident_bytes(server_pid)
        (replica,) = await client.statistics()
    return SoakResult(
        num_requests=num_requests,
        num_aborted=aborted,
        early_bytes=early_bytes,
        late_bytes=late_bytes,
        pages_leased=int(replica.values["pool_leased"]),
        pages_total=int(replica.values["pool_total"]),
    )


def resident_bytes(pid: int) -> int:
    """Resident size of a process and its descendants."""
    status = Path(f"/proc/{pid}/status").read_text()
    own = int(status.split("VmRSS:")[1].split()[0]) * 1024
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return own + sum(resident_bytes(int(child)) for child in children)
