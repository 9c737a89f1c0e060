"""Every number of the report by name: title, unit, what it means, which way is better.

The one place where a metric is defined: console, page, documentation and comparison print these
texts. Knows no data.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

STATISTICS: Final = ("mean", "p50", "p90", "p95", "p99", "max")
"""What is told of a metric that each request (or token, or message) has one value of."""
LOWER, HIGHER, NEITHER = "lower", "higher", ""


@dataclass(frozen=True, slots=True)
class Metric:
    """`unit` is "s", "tokens", "tokens/s", "requests", "requests/s", "share", "priced tokens",
    "steps", "rows" or "" (a bare number). `better` says which way is. `has_distribution`: it has
    `STATISTICS` rather than one value."""

    name: str
    title: str
    unit: str
    better: str
    group: str
    definition: str
    has_distribution: bool = False


def _latency(name: str, title: str, definition: str, unit: str = "s") -> Metric:
    return Metric(name, title, unit, LOWER, "latency", definition, has_distribution=True)


_ALL: Final = (
    _latency(
        "ttft_s",
        "TTFT",
        "From when the request was sent to its first output token, as the client sees it. In an"
        " open loop a request is sent when it is due, so queueing in the client counts.",
    ),
    _latency(
        "tpot_s",
        "TPOT",
        "(E2E - TTFT) / (output tokens - 1); undefined for one output token, and then left out."
        " The first token is not among them.",
    ),
    _latency(
        "itl_s",
        "ITL",
        "The gap between each output token and the one before it in its request, one value a token,"
        " not a message: tokens that come in one message have a gap of 0.",
    ),
    _latency(
        "delivery_gap_s",
        "Delivery gap",
        "Time between two messages with tokens of one request, however many tokens they bring.",
    ),
    _latency(
        "e2e_s",
        "E2E",
        "From when the request was sent to its last output token, queueing in the client included.",
    ),
    _latency(
        "queue_s",
        "Queueing",
        "Time in the replica's queue before the first slice that ran the request, where known.",
    ),
    Metric(
        "requests",
        "Requests",
        "requests",
        NEITHER,
        "requests",
        "Requests sent within the steady window. All latencies are of those that were completed.",
    ),
    Metric(
        "completed",
        "Completed",
        "requests",
        NEITHER,
        "requests",
        "Those whose answer is whole: they ended by a stop or at their length.",
    ),
    Metric(
        "errors",
        "Errors",
        "requests",
        LOWER,
        "requests",
        "Those that ended with an error.",
    ),
    Metric(
        "refused",
        "Refused",
        "requests",
        LOWER,
        "requests",
        "Those that were not taken in, such as by a full queue.",
    ),
    Metric(
        "deadline",
        "Deadline passed",
        "requests",
        LOWER,
        "requests",
        "Those whose deadline, or the queue's time-out, passed before the answer was whole.",
    ),
    Metric(
        "aborted",
        "Aborted",
        "requests",
        NEITHER,
        "requests",
        "Those that their client gave up. Neither failures nor part of any latency.",
    ),
    Metric(
        "unfinished",
        "Unfinished",
        "requests",
        LOWER,
        "requests",
        "Those that had not ended when the run did.",
    ),
    Metric(
        "requests_per_s",
        "Requests per second",
        "requests/s",
        HIGHER,
        "throughput",
        "Requests completed within the steady window, whenever sent, by its length.",
    ),
    Metric(
        "input_tokens_per_s",
        "Input tokens per second",
        "tokens/s",
        HIGHER,
        "throughput",
        "Prompt tokens, cached ones too, of requests whose first token came within the steady"
        " window, by its length.",
    ),
    Metric(
        "output_tokens_per_s",
        "Output tokens per second",
        "tokens/s",
        HIGHER,
        "throughput",
        "Output tokens delivered within the steady window, by its length.",
    ),
    Metric(
        "total_tokens_per_s",
        "All tokens per second",
        "tokens/s",
        HIGHER,
        "throughput",
        "Input and output tokens per second together.",
    ),
    Metric(
        "hit_rate",
        "Prefix hit rate",
        "share",
        HIGHER,
        "throughput",
        "Prompt tokens found in the prefix cache, of all prompt tokens of completed requests.",
    ),
    Metric(
        "goodput_share",
        "Goodput",
        "share",
        HIGHER,
        "goodput",
        "Completed requests that met every stated limit, of the requests sent within the steady"
        " window; aborted ones are left out. A request of one token meets any limit on TPOT.",
    ),
    Metric(
        "goodput_per_s",
        "Goodput per second",
        "requests/s",
        HIGHER,
        "goodput",
        "The same requests, by the length of the steady window.",
    ),
    Metric(
        "jain_service",
        "Jain, service",
        "",
        HIGHER,
        "fairness",
        "Jain's index, (sum x)^2 / (n sum x^2), of the clients' service by weight, cached tokens"
        " free: 1 is even, 1/n one client that takes all. Of the n clients that had demand at the"
        " same time, and of those moments alone. Where nobody waits it tells what clients ask for;"
        " what an order decides is the index of those backlogged.",
    ),
    Metric(
        "jain_service_clients",
        "n of Jain, service",
        "",
        NEITHER,
        "fairness",
        "Clients compared in it: those with most demand first, as long as all of them have an"
        " unfinished request in at least half of the steady window.",
    ),
    Metric(
        "jain_backlogged",
        "Jain, backlogged",
        "",
        HIGHER,
        "fairness",
        "The same of clients that wait: with a request that has no token yet at every moment"
        " compared. Nobody waits long below the knee; then it is missing.",
    ),
    Metric(
        "jain_backlogged_clients",
        "n of Jain, backlogged",
        "",
        NEITHER,
        "fairness",
        "Clients compared in it.",
    ),
    Metric(
        "jain_wait",
        "Jain, wait",
        "",
        HIGHER,
        "fairness",
        "Jain's index of the clients' mean TTFT, of those that completed a request sent within the"
        " steady window.",
    ),
    Metric(
        "jain_wait_clients",
        "n of Jain, wait",
        "",
        NEITHER,
        "fairness",
        "Clients compared in it.",
    ),
    Metric(
        "fleet_gap",
        "Service gap, clients",
        "priced tokens",
        LOWER,
        "fairness",
        "Most service beyond the least, by weight, of the clients and moments of"
        ' "Jain, backlogged", over all replicas, as the clients see it.',
    ),
    Metric(
        "service_gap",
        "Service gap, order",
        "priced tokens",
        LOWER,
        "fairness",
        "The largest gap that an order measured in its own service window, of any replica: most"
        " service beyond the least, by weight, of clients that waited throughout.",
    ),
    Metric(
        "service_gap_bound",
        "Bound of that gap",
        "priced tokens",
        NEITHER,
        "fairness",
        "What that order promised at that moment; missing where it promises nothing.",
    ),
    Metric(
        "gap_over_bound",
        "Gap / bound",
        "share",
        LOWER,
        "fairness",
        "The largest of all gaps, each by its bound at the moment: above 1 a promise was broken.",
    ),
    Metric(
        "order_jain",
        "Jain, order",
        "",
        HIGHER,
        "fairness",
        "Mean of Jain's index of the orders' own windows, each weighing as long as it was; of the"
        " replica where it is least.",
    ),
    Metric(
        "replicas",
        "Replicas",
        "",
        NEITHER,
        "load",
        "Replicas that ran a slice. Load and device are of the whole run, not of the window.",
    ),
    Metric(
        "utilisation",
        "Busy",
        "share",
        NEITHER,
        "load",
        "Time in which a device ran a slice, of the run's time, over all replicas.",
    ),
    Metric(
        "ct_std_s",
        "CT STD",
        "s",
        LOWER,
        "load",
        "Population standard deviation, over replicas, of the time at which each finished its last"
        " slice.",
    ),
    Metric(
        "busy_cv",
        "Busy time, CV",
        "share",
        LOWER,
        "load",
        "Coefficient of variation, over replicas, of the time they were busy: standard deviation by"
        " mean.",
    ),
    Metric(
        "busy_max_over_mean",
        "Busy time, max / mean",
        "",
        LOWER,
        "load",
        "The busiest replica's time by the mean.",
    ),
    Metric(
        "tokens_cv",
        "Tokens, CV",
        "share",
        LOWER,
        "load",
        "Coefficient of variation, over replicas, of prompt tokens run and output tokens made.",
    ),
    Metric(
        "slices",
        "Slices",
        "",
        NEITHER,
        "device",
        "Slices that the devices ran; of static batching: batches.",
    ),
    Metric(
        "slice_steps",
        "Steps a slice",
        "steps",
        NEITHER,
        "device",
        "Mean decode steps of a slice.",
    ),
    Metric(
        "slice_rows",
        "Rows a slice",
        "rows",
        NEITHER,
        "device",
        "Mean rows of a slice.",
    ),
    Metric(
        "slice_s",
        "Slice time",
        "s",
        NEITHER,
        "device",
        "Mean time of a slice on the device.",
    ),
    Metric(
        "slice_max_s",
        "Longest slice",
        "s",
        LOWER,
        "device",
        "Time of the longest slice.",
    ),
    Metric(
        "preemptions",
        "Preemptions",
        "",
        LOWER,
        "device",
        "Times that a request lost its rows to others, by the replicas' counters.",
    ),
    Metric(
        "pad_tokens",
        "Pad tokens",
        "tokens",
        LOWER,
        "device",
        "Positions that a static batch computes because its prompts differ in length.",
    ),
    Metric(
        "invalid_tokens",
        "Invalid tokens",
        "tokens",
        LOWER,
        "device",
        "Tokens made for a request after its end, because its static batch was still running.",
    ),
)
METRICS: Final[Mapping[str, Metric]] = {metric.name: metric for metric in _ALL}
DISTRIBUTIONS: Final = tuple(metric for metric in _ALL if metric.has_distribution)
NUMBERS: Final = tuple(metric for metric in _ALL if not metric.has_distribution)


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the tables of clients and of replicas."""

    name: str
    title: str
    unit: str
    definition: str


CLIENT_COLUMNS: Final = (
    Column("client", "Client", "name", "Who sent the requests."),
    Column("weight", "Weight", "", "Its share beside other clients'."),
    Column("requests", "Requests", "requests", "Requests sent within the steady window."),
    Column("completed", "Completed", "requests", "Those whose answer is whole."),
    Column("failed", "Failed", "requests", "Those refused, past their deadline or in error."),
    Column("aborted", "Aborted", "requests", "Those that the client gave up."),
    Column("demand", "Demand", "share", "Share of the steady window with a request unfinished."),
    Column("input_tokens", "Input", "tokens", "Prompt tokens served within the steady window."),
    Column("cached_tokens", "Cached", "tokens", "Those of them found in the prefix cache."),
    Column("output_tokens", "Output", "tokens", "Output tokens delivered within it."),
    Column(
        "service",
        "Service, all",
        "priced tokens",
        "Priced tokens with all prompt tokens, as the client sees them: a prompt counts when its"
        " first token comes.",
    ),
    Column(
        "service_uncached",
        "Service, uncached",
        "priced tokens",
        "The same without prompt tokens found cached.",
    ),
    Column("ttft_mean_s", "TTFT mean", "s", "Mean TTFT of completed requests."),
    Column("ttft_p50_s", "TTFT P50", "s", "Half of them were faster."),
    Column("ttft_p99_s", "TTFT P99", "s", "99 in 100 were faster."),
    Column("tpot_mean_s", "TPOT mean", "s", "Mean TPOT of completed requests."),
    Column("e2e_p50_s", "E2E P50", "s", "Half of them were faster."),
    Column("e2e_p99_s", "E2E P99", "s", "99 in 100 were faster."),
)
REPLICA_COLUMNS: Final = (
    Column("replica", "Replica", "name", "Its place."),
    Column("slices", "Slices", "", "Slices that its device ran, in the whole run."),
    Column("busy", "Busy", "share", "Time in which it ran a slice, of the run's time."),
    Column("slice_steps", "Steps a slice", "steps", "Mean decode steps of a slice."),
    Column("slice_rows", "Rows a slice", "rows", "Mean rows of a slice."),
    Column("prefill_tokens", "Prefill", "tokens", "Prompt tokens that it ran."),
    Column("output_tokens", "Output", "tokens", "Output tokens that it made."),
    Column("pad_tokens", "Pad", "tokens", "Positions computed because prompts differ in length."),
    Column("invalid_tokens", "Invalid", "tokens", "Tokens made after a request's end."),
    Column("preemptions", "Preemptions", "", "Times that a request lost its rows to others."),
    Column("last_end_s", "Last slice", "s", "When its last slice ended."),
    Column("gap", "Largest gap", "priced tokens", "The largest service gap that its order saw."),
    Column("bound", "Bound then", "priced tokens", "What its order promised at that moment."),
    Column("order_jain", "Jain, order", "", "Mean of Jain's index of its order's windows."),
)
PERCENTILES: Final = (
    "Linear between the two nearest values (numpy's default), of all values at once."
)
