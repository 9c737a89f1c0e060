"""A fleet in virtual time: requests come from a feed, the router sends them to simulated replicas.

Front ends cost time alone: `submit_s` from a client to a replica, `deliver_s` back. What a failed
replica had goes on elsewhere, prompt and delivered tokens together as a new prompt.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from jaxserve.engine.core import EngineCore
from jaxserve.engine.load_meter import LoadMeter
from jaxserve.engine.plan import SlicePlan
from jaxserve.errors import JaxserveError
from jaxserve.fleet.router import NoReplica, Router
from jaxserve.report.recorder import Recorder
from jaxserve.request import Delta, FinishReason, Request, SamplingParams
from jaxserve.schedulers.prefix_tree import KvEvent
from jaxserve.schedulers.routing import PrefixRouting, Routable
from jaxserve.sim.agenda import Agenda
from jaxserve.sim.cache_events import CacheEvents
from jaxserve.sim.device import Device
from jaxserve.sim.host import ModelledHost
from jaxserve.sim.modelled import ModelledSlice, Outputs
from jaxserve.sim.replica import SimulatedReplica
from jaxserve.sim_config import SimConfig
from jaxserve.workload.feed import Feed
from jaxserve.workload.work import Work

SCOPE = "all"
"""Page keys of a workload say already who shares what with whom."""

PageKeys = Callable[[Work], tuple[bytes, ...]]


@dataclass(slots=True, eq=False)
class _Live:
    """A request that was sent and has not ended. `attempt` counts the replicas it was on,
    `delivered` the tokens its client has, `carried` those of them that other replicas made."""

    work: Work
    sent_s: float
    page_keys: tuple[bytes, ...]
    request_id: str = ""
    replica: int = -1
    attempt: int = 0
    delivered: int = 0
    carried: int = 0
    cached: int = 0


@dataclass(slots=True, eq=False)
class _Replica:
    """A place in the fleet: the process that is there now, if any."""

    index: int
    process: SimulatedReplica | None = None
    cache: CacheEvents | None = None


class FleetSimulation:
    """Runs a feed to its end, on a fleet whose replicas are all alike."""

    def __init__(
        self,
        feed: Feed,
        router: Router,
        make_core: Callable[[], EngineCore],
        device: Device,
        recorder: Recorder,
        *,
        page_keys: PageKeys,
        config: SimConfig,
    ):
        self._feed, self._router, self._recorder = feed, router, recorder
        self._make_core, self._device = make_core, device
        self._page_keys, self._config = page_keys, config
        self.agenda = Agenda()
        self._outputs = Outputs()
        self._live: dict[str, _Live] = {}
        self._held: deque[_Live] = deque()  # while no replica is left
        self._note_due()
        self._replicas = [_Replica(index) for index in range(config.replicas)]
        self._blank = np.zeros(device.max_context, np.int32)  # what prompts say is in their keys
        self._rng = np.random.default_rng(config.seed)
        self.num_sent = self.num_ended = 0
        for replica in self._replicas:
            self._start(replica)
        for outage in config.outages:
            self.agenda.at(outage.down_s, self._fail, self._replicas[outage.replica])
            if outage.up_s is not None:
                self.agenda.at(outage.up_s, self._restart, self._replicas[outage.replica])

    # Running.

    def run(self, *, tick: Callable[["FleetSimulation"], None] = lambda simulation: None) -> None:
        """To the end of the feed, and of all that was sent; `tick` is called now and then."""
        while self.step():
            tick(self)
        for live in self._held:
            self._recorder.ended(live.work.number, self.agenda.now(), "error", live.cached)
        for replica in self._replicas:
            if replica.process is not None:
                self._recorder.replica(replica.index, replica.process.core.statistics().values())

    def cores(self) -> Iterator[EngineCore]:
        """Of the replicas that are up."""
        for replica in self._replicas:
            if replica.process is not None:
                yield replica.process.core

    def step(self, most: int = 10_000) -> bool:
        """At most so many events; whether there is more to do."""
        agenda, feed = self.agenda, self._feed
        while most > 0 and not self._is_over:
            happened = agenda.run(most)
            most -= happened
            if happened:
                continue
            if agenda.horizon_s == math.inf:
                return False
            agenda.advance(max(agenda.horizon_s, agenda.now()))
            for sent_s, work in feed.take(agenda.now()):
                self._send(work, sent_s)
            self._note_due()
            most -= 1
        return not self._is_over

    @property
    def _is_over(self) -> bool:
        return not self._live and not self._held and self._feed.finished

    def _note_due(self) -> None:
        """The feed may be due at another time: it took requests, or one has ended, perhaps the
        last of all, after which nothing happens any more."""
        due_s = self.agenda.now() if self._is_over else self._feed.next_s()
        self.agenda.horizon_s = math.inf if due_s is None else due_s

    # Requests.

    def _send(self, work: Work, sent_s: float) -> None:
        self._recorder.sent(work, sent_s)
        self.num_sent += 1
        live = _Live(work, sent_s, self._page_keys(work))
        self._outputs.end_length[work.number] = work.prompt_tokens + work.output_tokens
        if work.abort_s is not None:
            self.agenda.at(sent_s + work.abort_s, self._hang_up, live)
        self._route(live)

    def _route(self, live: _Live) -> None:
        work = live.work
        live.attempt += 1
        routable = Routable(
            number=work.number,
            client=work.client,
            weight=work.weight,
            num_prompt_tokens=work.prompt_tokens + live.delivered,
            page_keys=live.page_keys,
            session=work.session,
        )
        try:
            live.replica = self._router.route(routable, self.agenda.now())
        except NoReplica:
            live.replica = -1
            self._held.append(live)
            return
        live.carried = live.delivered
        live.request_id = f"{work.number}.{live.attempt}"
        self._live[live.request_id] = live
        process = self._replicas[live.replica].process
        assert process is not None, "the router names replicas that are up"
        request = self._request(live)
        if self._config.submit_s:
            self.agenda.at(self.agenda.now() + self._config.submit_s, process.submit, request)
        else:
            process.submit(request)

    def _request(self, live: _Live) -> Request:
        work = live.work
        prompt = self._blank[: work.prompt_tokens + live.carried]
        return Request(
            request_id=live.request_id,
            prompt=prompt,
            params=SamplingParams(
                max_tokens=work.max_tokens - live.carried,
                ignore_eos=True,
                temperature=0.0,
                seed=work.number,
            ),
            client=work.client,
            weight=work.weight,
            priority=work.priority,
            arrived_s=live.sent_s,
            deadline_s=None if work.deadline_s is None else live.sent_s + work.deadline_s,
            page_keys=live.page_keys,
            scope=SCOPE,
        )

    def _hang_up(self, live: _Live) -> None:
        """Its client leaves: what comes after is not delivered."""
        if live.replica < 0:
            self._held.remove(live)
            self._live[live.request_id] = live
        elif self._live.get(live.request_id) is not live:
            return
        else:
            process = self._replicas[live.replica].process
            assert process is not None, "what a failed replica had is elsewhere"
            process.abort(live.request_id)
        self._end(live, FinishReason.ABORT.value)

    # What replicas say.

    def _on_deltas(self, deltas: Sequence[Delta]) -> None:
        if self._config.deliver_s:
            self.agenda.at(self.agenda.now() + self._config.deliver_s, self._deliver, deltas)
        else:
            self._deliver(deltas)

    def _deliver(self, deltas: Sequence[Delta]) -> None:
        now_s, delivered, requests = self.agenda.now(), self._recorder.delivered, self._live
        for delta in deltas:
            live = requests.get(delta.request_id)
            if live is None:
                continue  # of a replica that failed since
            count = len(delta.tokens)
            if count:
                if not live.delivered:
                    live.cached = delta.cached_tokens
                live.delivered += count
                delivered(live.work.number, now_s, count)
            if delta.finish is not None:
                self._end(live, delta.finish.value)

    def _on_refusal(self, request_id: str, error: JaxserveError) -> None:
        live = self._live.get(request_id)
        if live is not None:  # else its client left before the replica saw it
            self._end(live, "refused")

    def _end(self, live: _Live, reason: str) -> None:
        now_s, work = self.agenda.now(), live.work
        del self._live[live.request_id], self._outputs.end_length[work.number]
        self._recorder.ended(work.number, now_s, reason, live.cached, replica=live.replica)
        self._router.ended(work.number, live.delivered - live.carried)
        self._feed.ended(work, now_s)
        self._note_due()
        self.num_ended += 1

    # Replicas.

    def _start(self, replica: _Replica) -> None:
        core = self._make_core()
        replica.process = process = SimulatedReplica(
            core,
            lambda clock: self._device.executor(clock, self._outputs),
            ModelledHost(self._device.time, overlaps=self._device.host_overlaps),
            self.agenda,
            host_overlaps=self._device.host_overlaps,
            on_deltas=self._on_deltas,
            on_refusal=self._on_refusal,
            on_slice=partial(self._on_slice, replica),
        )
        if isinstance(self._router.routing, PrefixRouting):
            replica.cache = CacheEvents(core.pool.tree)
        meter, at_s = LoadMeter(page_size=core.pool.page_size), self.agenda.now()
        self.agenda.at(at_s + self._config.report_s, self._report, replica, process, meter)

    def _fail(self, replica: _Replica) -> None:
        """The process is gone: what it had goes on elsewhere."""
        process = replica.process
        if process is None:
            return
        process.stop()
        self._recorder.replica(replica.index, process.core.statistics().values())
        replica.process = replica.cache = None
        self._router.lost(replica.index)
        for live in [each for each in self._live.values() if each.replica == replica.index]:
            del self._live[live.request_id]
            self._route(live)

    def _restart(self, replica: _Replica) -> None:
        """A fresh process is there, with an empty cache; what was held goes on."""
        if replica.process is not None:
            return
        self._start(replica)
        self._router.joined(replica.index)
        held, self._held = self._held, deque()
        for live in held:
            self._route(live)

    def _on_slice(self, replica: _Replica, plan: SlicePlan, ticket: ModelledSlice) -> None:
        self._recorder.slice(
            replica.index,
            ticket.begin_s,
            ticket.ready_s,
            steps=ticket.result.steps_run,
            rows=len(plan.rows),
            prefill_tokens=plan.num_prefill_tokens,
            output_tokens=ticket.output_tokens,
        )
        if replica.cache is None or replica.process is None:
            return
        events = replica.cache.pull()
        lost = self._config.cache_event_loss
        if events and not (lost and self._rng.random() < lost):
            seen = replica.process.received
            at_s = self.agenda.now() + self._config.cache_event_s
            self.agenda.at(at_s, self._change_cache, replica, replica.process, events, seen)

    def _change_cache(
        self,
        replica: _Replica,
        process: SimulatedReplica,
        events: Sequence[KvEvent],
        seen: int,
    ) -> None:
        if replica.process is process:
            for event in events:
                self._router.cache_changed(replica.index, event, seen)

    def _report(self, replica: _Replica, process: SimulatedReplica, meter: LoadMeter) -> None:
        """The router hears how the replica is, now and then."""
        if replica.process is not process:
            return
        now_s, core = self.agenda.now(), process.core
        load = meter.report(
            core.statistics_now,
            core.pool.statistics(),
            num_running=core.num_running,
            now_s=now_s,
            num_received=process.received,
        )
        self._router.report(replica.index, load, now_s)
        window = core.meter.window()
        self._recorder.fairness(
            replica.index,
            now_s,
            clients=window.clients,
            window_s=window.seconds,
            gap=window.gap,
            bound=window.bound,
            jain=window.jain,
        )
        self.agenda.at(now_s + self._config.report_s, self._report, replica, process, meter)
