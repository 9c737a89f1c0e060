"""The command line: picks a command, reads its flags, runs it. Loads neither JAX nor gRPC itself.

Exit codes: 0 done, 1 our own failure, 2 something the user can mend (a flag, a file, a port; always
one line on stderr), 128 + n ended by a second signal n.
"""

import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from jaxserve import __version__, flags
from jaxserve import flag_table as table
from jaxserve.errors import ConfigError

EXIT_USAGE: Final = 2


@dataclass(frozen=True, slots=True)
class Command:
    """`module` has `main(settings) -> exit code`; imported late, so that help stays instant."""

    summary: str
    module: str
    example: str
    groups: tuple[table.Group, ...]


COMMANDS: Final = {
    "serve": Command(
        "serve a model over gRPC and HTTP",
        "jaxserve.server.serve",
        "jaxserve serve --model=demo --port=8470",
        (
            table.MODEL,
            table.BASE_SEED,
            table.MEMORY,
            table.SCHEDULING,
            table.SERVER,
            table.LOGGING,
        ),
    ),
    "generate": Command(
        "continue one prompt, streamed to stdout",
        "jaxserve.server.generate",
        'jaxserve generate --prompt="ROMEO:" --server=127.0.0.1:8470',
        (table.PROMPT, table.SAMPLING, table.MODEL, table.MEMORY),
    ),
    "bench": Command(
        "load a server, ours or any of OpenAI's dialect, and measure it",
        "jaxserve.bench.load_command",
        "jaxserve bench --server=127.0.0.1:8470 --rate=8 --length_scale=0.25",
        (table.BENCH, table.AGAINST_SIMULATION, table.SWEEP, table.WORKLOAD, table.OUTPUT),
    ),
    "simulate": Command(
        "run a workload on simulated replicas, and report what clients would see",
        "jaxserve.sim.command",
        "jaxserve simulate --workload=fair_mix --rate=120 --preset=d2lpm --replicas=8",
        (
            table.WORKLOAD,
            table.SIMULATION,
            table.SIMULATED_MEMORY,
            table.FLEET_SCHEDULING,
            table.OUTPUT,
        ),
    ),
    "report": Command(
        "show runs of simulate and bench side by side, or one again",
        "jaxserve.report.command",
        "jaxserve report --compare=a.json --compare=b.json --html=both.html",
        (table.REPORT,),
    ),
    "key": Command(
        "make an API key and the entry of the key file that knows it",
        "jaxserve.server.key",
        "jaxserve key --client=acme --weight=2 >>keys.toml",
        (table.KEY,),
    ),
    "convert": Command(
        "write a Hugging Face model as one of ours",
        "jaxserve.server.convert_model",
        "jaxserve convert --model=hf:Qwen3-0.6B --output=qwen3",
        (table.CONVERSION,),
    ),
    "compile": Command(
        "compile a deployment for chips that are not there, and say whether it fits",
        "jaxserve.server.compile_programs",
        "jaxserve compile --model=random:llama3-8b --topology=v5e:2x2",
        (table.COMPILATION, table.COMPILED_MODEL, table.COMPILED_MEMORY, table.PROGRAMS),
    ),
    "profile": Command(
        "measure how long slices take on this device, for simulations",
        "jaxserve.bench.profile",
        "jaxserve profile --model=random:llama-14m --output=profile.json",
        (table.PROFILING, table.MODEL, table.PROGRAMS, table.MEMORY),
    ),
    "policies": Command(
        "list the scheduling policies and presets: source, parameters, laws",
        "jaxserve.server.policies",
        "jaxserve policies",
        (),
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (without the program's name); returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # gRPC's C core would write its own lines among ours, for every connection that ends.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    try:
        return _run(arguments)
    except ConfigError as error:
        print(f"jaxserve: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_USAGE


def _run(arguments: list[str]) -> int:
    match arguments:
        case [] | ["help" | "-h" | "--help"]:
            print(_overview())
            return 0
        case ["help", name]:
            print(_command_help(name, _command(name)))
            return 0
        case ["--version" | "version"]:
            print(f"jaxserve {__version__}")
            return 0
        case [name, *rest]:
            command = _command(name)
            if any(word in ("-h", "--help", "-help") for word in rest):
                print(_command_help(name, command))
                return 0
            known = {
                flag.name
                for other in COMMANDS.values()
                for group in other.groups
                for flag in group.flags
            }
            settings = flags.parse(command.groups, rest, environment=os.environ, known=known)
            return importlib.import_module(command.module).main(settings)
    raise AssertionError(arguments)


def _command(name: str) -> Command:
    if name not in COMMANDS:
        hint = flags.near(name, COMMANDS) or f"; commands: {', '.join(COMMANDS)}"
        raise ConfigError(f"unknown command {name!r}{hint}")
    return COMMANDS[name]


def _overview() -> str:
    lines = [f"jaxserve {__version__}: LLM serving on JAX, slice by slice", "", "commands:"]
    lines += [f"  {name:<10} {command.summary}" for name, command in COMMANDS.items()]
    lines += ["", "`jaxserve <command> --help` lists a command's flags."]
    return "\n".join(lines)


def _command_help(name: str, command: Command) -> str:
    head = f"jaxserve {name}: {command.summary}\nexample: {command.example}"
    return f"{head}\n{flags.help_text(command.groups)}"
