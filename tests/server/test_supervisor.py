"""The supervisor against small programs that stand in for an engine."""

import asyncio
import os
import signal
import sys
import time

import pytest

from jaxserve.config import CacheConfig, EngineConfig, SchedulerConfig
from jaxserve.errors import ConfigError
from jaxserve.server.engine_launch import (
    EngineLaunch,
    Failure,
    Progress,
    Ready,
    status_from_line,
    status_to_line,
)
from jaxserve.server.supervisor import EngineLost, EngineSupervisor, RestartPolicy

READY = Ready(num_pages=4, page_size=8, num_programs=0, device="none", start_s=0.1)
FAST = RestartPolicy(first_wait_s=0.01, most_quick_failures=2)

SAY = "import json, os, sys, time\ndef say(**fields): print(json.dumps(fields), flush=True)\n"
SERVE = (
    SAY
    + f"""
launch = json.loads(sys.stdin.readline())
say(kind="Progress", text="compiling 1/2 " + launch["config"]["model"])
print({status_to_line(READY).decode()!r}, end="", flush=True)
sys.stdin.read()
"""
)


def supervisor(code, **arguments):
    arguments.setdefault("policy", FAST)
    return EngineSupervisor(
        EngineConfig(model="stand-in"),
        socket_path="/nowhere",
        command=(sys.executable, "-c", code),
        **arguments,
    )


async def run_until_end(watched):
    try:
        await watched.launch()
        await asyncio.wait_for(watched.run(), 20)
    finally:
        await watched.stop()


def test_launch_and_statuses_survive_the_pipe():
    config = EngineConfig(
        cache=CacheConfig(num_pages=7),
        scheduler=SchedulerConfig(order="dlpm", order_options=("quantum=64",)),
    )
    launch = EngineLaunch(config=config, socket_path="/s", restarts=3)
    assert EngineLaunch.from_json(launch.to_json()) == launch
    for status in (Progress("a\nb"), READY, Failure("no")):
        line = status_to_line(status)
        assert line.count(b"\n") == 1 and status_from_line(line) == status


def test_a_killed_engine_is_started_again_and_stop_ends_it():
    readies, progress = [], []

    async def scenario():
        came = asyncio.Event()
        watched = supervisor(
            SERVE,
            on_ready=lambda ready: (readies.append(ready), came.set()),
            on_progress=progress.append,
        )
        await watched.launch()
        following = asyncio.create_task(watched.run())
        await asyncio.wait_for(came.wait(), 10)
        first = watched.statistics()
        assert first.ready and first.restarts == 0 and first.pid is not None
        came.clear()
        os.kill(first.pid, signal.SIGKILL)
        await asyncio.wait_for(came.wait(), 10)
        second = watched.statistics()
        assert second.ready and second.restarts == 1 and second.pid != first.pid
        await watched.stop()
        await asyncio.wait_for(following, 5)
        assert watched.statistics().pid is None

    asyncio.run(scenario())
    assert readies == [READY, READY]
    assert progress == ["compiling 1/2 stand-in"] * 2


def test_gives_up_after_quick_failures_and_says_how_the_last_one_ended():
    watched = supervisor("raise SystemExit(7)")
    with pytest.raises(
        EngineLost, match="exited with code 7 before it was ready; giving up after 3"
    ):
        asyncio.run(run_until_end(watched))
    assert watched.statistics().restarts == 2


def test_what_the_user_can_mend_is_told_at_once():
    watched = supervisor(SAY + "say(kind='Failure', text='model: no such file')\nsys.exit(2)")
    with pytest.raises(ConfigError, match="^model: no such file$"):
        asyncio.run(run_until_end(watched))
    assert watched.statistics().restarts == 0


def test_a_failure_after_the_first_engine_served_is_tried_again():
    code = SAY + (
        "launch = json.loads(sys.stdin.readline())\n"
        "if launch['restarts']: say(kind='Failure', text='no memory'); sys.exit(2)\n"
        f"print({status_to_line(READY).decode()!r}, end='', flush=True)"
    )
    with pytest.raises(EngineLost, match="no memory; giving up after 3 quick failures"):
        asyncio.run(run_until_end(supervisor(code)))


def test_lines_that_are_no_status_are_logged_not_fatal(caplog):
    code = (
        "print('library chatter', flush=True)\n"
        + SAY
        + ("say(kind='Failure', text='the reason')\nsys.exit(2)")
    )
    with pytest.raises(ConfigError, match="the reason"):
        asyncio.run(run_until_end(supervisor(code)))
    assert "library chatter" in caplog.text


def test_an_engine_dies_with_its_parent():
    # The parent is killed outright, so only the kernel can tell the engine.
    parent_code = f"""
import asyncio, os, sys
from jaxserve.config import EngineConfig
from jaxserve.server.supervisor import EngineSupervisor
async def main():
    watched = EngineSupervisor(EngineConfig(), socket_path="/nowhere",
        command=(sys.executable, "-c", {SERVE!r}), on_ready=lambda _: (
            print(watched.statistics().pid, flush=True), os.kill(os.getpid(), 9)))
    await watched.launch()
    await watched.run()
asyncio.run(main())
"""

    async def scenario():
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", parent_code, stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        pid = int(await asyncio.wait_for(process.stdout.readline(), 20))
        await process.wait()
        return pid

    pid = asyncio.run(scenario())
    deadline_s = time.monotonic() + 5
    while _alive(pid) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    assert not _alive(pid)


def _alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_waits_grow_and_have_a_bound():
    policy = RestartPolicy(first_wait_s=0.5, most_wait_s=3.0)
    assert [policy.wait_s(count) for count in range(6)] == [0.0, 0.5, 1.0, 2.0, 3.0, 3.0]
