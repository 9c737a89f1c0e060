"""Command line: every flag reaches a field, every mistake is one line and exit code 2."""

import os
import subprocess
import sys

import pytest

from jaxserve import flag_table, flags, launch
from jaxserve.config import EngineConfig, PresetConfig
from jaxserve.errors import ConfigError
from jaxserve.request import SamplingParams
from jaxserve.schedulers.catalog import ADMISSIONS, ORDERS, ROUTINGS, SLICINGS, VICTIMS
from jaxserve.schedulers.presets import PRESETS
from jaxserve.server_config import (
    BenchConfig,
    ConvertConfig,
    GenerateConfig,
    LogConfig,
    ServerConfig,
)

SERVE = launch.COMMANDS["serve"].groups
ALL_FLAGS = [
    flag for command in launch.COMMANDS.values() for g in command.groups for flag in g.flags
]
KNOWN = {flag.name for flag in ALL_FLAGS}


def parse(*arguments, groups=SERVE, **environment):
    return flags.parse(groups, arguments, environment=environment, known=KNOWN)


def jaxserve(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "jaxserve", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=30,
    )


@pytest.mark.parametrize("flag", ALL_FLAGS, ids=lambda flag: flag.name)
def test_every_flag_names_a_field_and_has_a_line_of_help(flag):
    record = flag.record
    *parents, last = flag.path.split(".")
    for part in parents:
        record = record.__dataclass_fields__[part].type
    assert last in record.__dataclass_fields__
    assert flag.help and "\n" not in flag.help and len(flag.help) <= 70


@pytest.mark.parametrize(
    "kind", [ServerConfig, LogConfig, GenerateConfig, ConvertConfig, PresetConfig, BenchConfig]
)
def test_every_field_of_the_commands_records_has_a_flag(kind):
    paths = {flag.path for flag in ALL_FLAGS if flag.record is kind}
    assert paths == set(kind.__dataclass_fields__)


def test_every_field_of_the_engines_records_has_a_flag():
    paths = {flag.path for flag in ALL_FLAGS if flag.record is EngineConfig}
    nested = ("cache", "scheduler")
    fields = set(EngineConfig.__dataclass_fields__) - {*nested, "replica"}
    for name in nested:
        record = EngineConfig.__dataclass_fields__[name].default
        fields |= {f"{name}.{field}" for field in record.__dataclass_fields__}
    assert paths == fields


def test_without_flags_the_records_are_the_defaults():
    settings = parse()
    assert settings.record(ServerConfig) == ServerConfig()
    assert settings.record(LogConfig) == LogConfig()
    cache = flag_table.user_cache_dir()
    assert settings.record(EngineConfig) == EngineConfig(compilation_cache=cache)


def test_flags_reach_nested_records():
    engine = parse("--page_size=16", "--slicing=fixed", "--nooverlap").record(EngineConfig)
    assert engine.cache.page_size == 16
    assert engine.scheduler.slicing == "fixed" and not engine.scheduler.overlap


def test_command_line_wins_over_environment_over_default():
    environment = {"JAXSERVE_PORT": "1", "JAXSERVE_DRAIN_S": "2", "PATH": "/bin"}
    server = parse("--port=3", **environment).record(ServerConfig)
    assert (server.port, server.drain_s, server.host) == (3, 2.0, "127.0.0.1")


def test_variables_of_other_commands_and_of_tests_are_left_alone():
    parse(JAXSERVE_PROMPT="x", JAXSERVE_TEST_ANYTHING="y")


def test_flagfile_is_read(tmp_path):
    file = tmp_path / "flags"
    file.write_text("# a comment\n--port=9\n--max_rows=5\n")
    settings = parse(f"--flagfile={file}")
    assert settings.record(ServerConfig).port == 9
    assert settings.record(EngineConfig).scheduler.max_rows == 5


def test_what_differs_from_the_defaults_is_marked():
    text = parse("--port=9", JAXSERVE_ORDER="priority").describe()
    assert " *port=9" in text and "*order=priority (environment)" in text
    assert " admission=slice_lease" in text and "num_pages=unset" in text
    assert all(len(line) <= 100 for line in text.splitlines())


def test_a_preset_fills_in_what_nobody_chose(tmp_path):
    scheduler = parse("--preset=sls").record(EngineConfig).scheduler
    assert (scheduler.order, scheduler.slicing) == ("fcfs", "sequence")
    assert scheduler.admission == "reserve_max"
    file = tmp_path / "flags"
    file.write_text("--admission=peak\n")
    arguments = ("--preset=sls", f"--flagfile={file}")
    scheduler = parse(*arguments, JAXSERVE_SLICING="fixed").record(EngineConfig).scheduler
    assert (scheduler.admission, scheduler.slicing) == ("peak", "fixed")
    scheduler = parse("--order=fcfs", JAXSERVE_PRESET="vtc").record(EngineConfig).scheduler
    assert (scheduler.order, scheduler.order_options) == ("fcfs", ())


def test_what_a_preset_set_is_shown():
    text = " ".join(parse("--preset=vtc", "--order_options=w_out=3").describe().split())
    assert " *preset=vtc " in text and " *order=vtc (preset) " in text
    assert " *order_options=price_cached=1,w_out=3 admission=slice_lease " in text
    assert " preset=default " in parse().describe()


def test_repeated_stop_strings_arrive_as_a_tuple():
    groups = launch.COMMANDS["generate"].groups
    settings = parse("--stop=a", "--stop=b,c", "--top_k=4", groups=groups)
    params = settings.record(SamplingParams)
    assert params == SamplingParams(stop=("a", "b,c"), top_k=4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prot=1"], "unknown flag --prot; did you mean --port?"),
        (["--port=x"], "flag --port=x: allowed: a whole number"),
        (["--drain_s=soon"], "flag --drain_s=soon: allowed: a number"),
        (["--overlap=perhaps"], "flag --overlap=perhaps: allowed: true or false"),
        (["--port"], "Missing value for flag --port"),
        (["serve"], "got 'serve', which is no flag; flags look like --name=value"),
        (["--flagfile=/no/such/file"], "flagfile: Unable to open flagfile: .*No such file"),
    ],
)
def test_parse_errors_are_one_line_and_name_the_flag(arguments, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse(*arguments)
    assert "\n" not in str(caught.value)


def test_unknown_and_bad_variables_are_named():
    with pytest.raises(ConfigError, match="ROWS: no such flag; did you mean JAXSERVE_MAX_ROWS?"):
        parse(JAXSERVE_MAXROWS="1")
    with pytest.raises(ConfigError, match="environment variable JAXSERVE_PORT=x: allowed: a whole"):
        parse(JAXSERVE_PORT="x")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--order=lifo"], "order: got 'lifo'; allowed: fcfs, priority, "),
        (["--order=dlmp"], "order: got 'dlmp'; allowed: .*; did you mean 'dlpm'"),
        (["--order=dlpm", "--order_options=qantum=1"], "unknown parameter 'qantum'; did you mean"),
        (["--order=dlpm", "--order_options=quantum=0"], "quantum: got 0.0; allowed: a positive"),
        (["--order=dlpm", "--order_options=quantum=inf"], "quantum: got inf; allowed: a positive"),
        (["--order=vtc", "--order_options=w_in=-1"], "w_in: got -1.0; allowed: 0 or more"),
        (["--order=vtc", "--order_options=w_in"], "got 'w_in'; options look like parameter=value"),
        (["--order=fcfs", "--order_options=x=1"], "unknown parameter 'x'; there are: -"),
        (["--admission=pastfuture"], "admission: got .*; did you mean 'past_future'"),
        (["--admission_options=u=1"], "admission_options: unknown parameter 'u'; there are: -"),
        (
            ["--admission=past_future", "--admission_options=u=2"],
            r"admission_options: u: got 2.0; allowed: a number in \(0, 1\]",
        ),
        (
            ["--admission=ratio", "--admission_options=clip=0"],
            "admission_options: clip: got 0; allowed: 1 or more",
        ),
        (["--slicing=fxed"], "slicing: got 'fxed'; allowed: .*; did you mean 'fixed'"),
        (["--slicing_options=hazard=0"], "slicing_options: hazard: got 0.0; allowed: a number in"),
        (["--victim=oldest"], "victim: got 'oldest'; allowed: order, newest, fewest_made"),
        (["--slicing=fixed", "--max_gap_ms=5"], "max_gap_ms: got 5.0; allowed: 0, for --slicing=f"),
        (["--preset=sls", "--max_gap_ms=5"], "max_gap_ms: got 5.0; allowed: 0, for --slicing=s"),
        (
            ["--order=lpm", "--noprefix_cache"],
            "order: got 'lpm', which sorts by cached prefixes; allowed with --prefix_cache=false",
        ),
        (
            ["--preset=dlpm", "--noprefix_cache"],
            "order: got 'dlpm', which sorts by cached prefixes",
        ),
        (["--mesh=2"], "mesh: got '2'; allowed: auto or tp=<number of devices>"),
        (["--page_size=24"], "page_size: got 24; allowed: 8, 16 ... 256"),
        (["--kv_dtype=int4"], "kv_dtype: got 'int4'; allowed: auto, float32, bfloat16, int8"),
        (["--kv_memory_fraction=2"], "kv_memory_fraction: got 2.0; allowed"),
    ],
)
def test_values_are_judged_by_the_records(arguments, message):
    with pytest.raises(ConfigError, match=message):
        parse(*arguments).record(EngineConfig)


def test_policies_are_listed_with_their_parameters(capsys):
    assert launch.main(["policies"]) == 0
    out = capsys.readouterr().out
    every = (*ORDERS, *ADMISSIONS, *SLICINGS, *VICTIMS, *ROUTINGS, *PRESETS)
    for name in every:
        assert f"\n{name}" in out
    assert "never_preempts" in out and "min_samples=16" in out and "--slicing=sequence" in out
    assert "quantum=8192.0" in out and "reconstruction" in out and "bounded_service_gap" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "--order=lifo"], "jaxserve: order: got 'lifo'; allowed: fcfs, priority, "),
        (["generate", "--prompt=x", "--api_key=k"], "jaxserve: --api_key is for a server; leave"),
        (["serve", "--preset=scls"], "jaxserve: preset: got 'scls'; allowed: default, sls, ils, "),
        (["serve", "--preset=d2lpm"], "jaxserve: preset: got 'd2lpm'; allowed: default, sls, "),
        (["serv"], "jaxserve: unknown command 'serv'; did you mean serve?\n"),
        (["generate"], "jaxserve: prompt: got '' and token_ids ''; allowed: exactly one"),
        (
            ["generate", "--prompt=x", "--server=h:1", "--page_size=8"],
            "jaxserve: --page_size is the server's to set; leave it out with --server\n",
        ),
    ],
)
def test_mistakes_are_one_line_on_stderr_and_exit_2(arguments, message, capfd):
    assert launch.main(arguments) == 2
    out, err = capfd.readouterr()
    assert err.startswith(message) and err.count("\n") == 1 and out == ""


def test_help_lists_commands_and_grouped_flags(capsys):
    assert launch.main(["help"]) == 0
    assert launch.main(["serve", "--help"]) == 0
    text = capsys.readouterr().out
    assert "generate" in text and "\nscheduling:\n" in text
    for group in SERVE:
        for flag in group.flags:
            assert f"--{flag.name} " in text
    assert all(len(line) <= 120 for line in text.splitlines())


def test_the_command_line_starts_without_jax_and_grpc():
    code = "import jaxserve.launch, jaxserve.server.serve, sys; print(*sys.modules)"
    loaded = set(subprocess.check_output([sys.executable, "-c", code], text=True).split())
    assert not {"jax", "grpc", "flax", "tokenizers"} & loaded


def test_version_and_exit_code_of_the_module():
    done = jaxserve("--version")
    assert done.returncode == 0 and done.stdout.startswith("jaxserve ")
    done = jaxserve("serve", "--port=70000")
    assert done.returncode == 2
    assert done.stderr == "jaxserve: port: got 70000; allowed: 0 (any free one) to 65535\n"
