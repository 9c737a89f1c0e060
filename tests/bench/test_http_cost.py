"""The comparison of HTTP with gRPC: the same answers both ways, one event for each delivery."""

import os

from jaxserve.bench.http_cost import GRPC, HTTP, measure


def test_both_dialects_give_the_same_answers_in_as_many_events_as_there_were_deliveries():
    cores = sorted(os.sched_getaffinity(0))
    cost = measure(
        model="demo",
        num_streams=4,
        num_requests=8,
        mean_tokens=8,
        num_rounds=1,
        server_core=cores[0],
        client_core=cores[-1],
        serve_flags=["--executor=mock", "--slicing=fixed", "--slice_steps=2"],
    )
    assert set(os.sched_getaffinity(0)) == set(cores)
    assert [part.dialect for part in cost.rounds] == [GRPC, HTTP]
    grpc, http = cost.rounds
    assert grpc.tokens == http.tokens and grpc.ttft_s.shape == http.ttft_s.shape == (8,)
    for part in cost.rounds:
        assert 0.5 * part.tokens <= part.deliveries <= part.tokens
        assert 0 < part.events <= part.deliveries
    assert len(list(cost.report())) == 6
