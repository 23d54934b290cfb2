"""The command `flatops`. Each sub-command imports only what it needs; a user error prints one line, not a traceback."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from flatops import distributed, terminal
from flatops.methods import METHODS

C = TypeVar("C")
# The extra of this package that installs each optional dependency.
EXTRA = dict.fromkeys(
    ("matplotlib", "numpy", "PIL", "rich", "sklearn", "timm", "tomli", "torchvision", "tyro"), "train"
) | {"plotly": "landscape", "tensorboard": "tensorboard", "pytorch_optimizer": "test"}


@dataclass
class InfoConfig:
    """Show versions, the compiled core, the SIMD level, threads, and each device with its backend."""

    json: bool = False
    """Print JSON."""


def parse(config_type: type[C], command: str, arguments: list[str], default: C | None = None) -> C:
    """Parse a configuration; options that are not given come from `default`."""
    import tyro

    style = (tyro.conf.DisallowNone, tyro.conf.FlagCreatePairsOff)
    prog, first = f"flatops {command}", distributed.launched()[0] == 0
    return tyro.cli(config_type, prog=prog, args=arguments, default=default, config=style, console_outputs=first)


def info(arguments: list[str]) -> int:
    """show versions, what was compiled, and the backend of each device"""
    from flatops import info

    config = parse(InfoConfig, "info", arguments)
    report = info.report()
    if config.json:
        print(json.dumps(report, indent=2))
    else:
        info.show(report)
    return 0


def train(arguments: list[str]) -> int:
    from flatops.train import TrainCommand, TrainConfig, checkpoint, presets, profile, train
    from flatops.train.config import with_method

    default = TrainConfig()  # values of the options that are not given
    resume, preset, method = (given(arguments, name) for name in ("resume", "preset", "method"))
    if resume and preset:
        raise ValueError("resume continues with the options of its run: leave out preset")
    if resume:
        default = checkpoint.unpack_config(checkpoint.read(Path(resume)), Path(resume))
    elif preset:
        default = presets.recipe(preset)
        if method in METHODS:  # some options of the preset's own method may not apply to this one
            default = with_method(default, method)
    command = parse(TrainCommand, "train", arguments, TrainCommand(**vars(default)))
    config = TrainConfig(**{name: getattr(command, name) for name in vars(default)})
    profile(config) if command.profile else train(config)
    return 0


*_labels, _last = (method.label for method in METHODS.values())
train.__doc__ = f"train a network with {', '.join(_labels)} or {_last}"


def given(arguments: list[str], option: str) -> str | None:
    """The value of one option, needed before the others can be parsed."""
    parser = argparse.ArgumentParser(prog="flatops train", add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{option}")
    return getattr(parser.parse_known_args(arguments)[0], option)


def compare(arguments: list[str]) -> int:
    """train several methods over several seeds and compare them"""
    from flatops.train import CompareConfig, compare

    compare(parse(CompareConfig, "compare", arguments))
    return 0


def landscape(arguments: list[str]) -> int:
    """plot the loss landscape of trained networks: curves, surfaces, sharpness, top eigenvalue"""
    from flatops.landscape.config import LandscapeConfig

    config = parse(LandscapeConfig, "landscape", arguments)
    from flatops.landscape.run import landscape  # imports plotly, which --help does not need

    landscape(config)
    return 0


def bench(arguments: list[str]) -> int:
    """benchmark the kernels on this machine"""
    from flatops.benchmarks import bench, command

    return command.main(parse(bench.Config, "bench", arguments))


COMMANDS: dict[str, Callable[[list[str]], int]] = {f.__name__: f for f in (info, train, compare, landscape, bench)}


def main(arguments: list[str] | None = None) -> int:
    """Run a sub-command and return its exit status: 0, 2 after a user error, 130 after Ctrl-C."""
    terminal.replace_unencodable()
    os.environ["MPLBACKEND"] = "agg"  # plots go to files; a notebook may have set a backend that is not installed
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("-h", "--help"):
        print(usage())
        return 0
    if command not in COMMANDS:
        print(f"flatops: unknown command {command!r}\n\n{usage()}", file=sys.stderr)
        return 2
    try:
        return COMMANDS[command](rest)
    except KeyboardInterrupt:
        return 130
    except ModuleNotFoundError as error:
        package = "tensorboard" if "tensorboard" in (error.name or "") else error.name
        if package not in EXTRA:
            raise
        message = f"{error.name} is missing; install it with: pip install 'flatops[{EXTRA[package]}]'"
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        message = str(error)
    rank, *_ = distributed.launched()
    where = f" (rank {rank})" if rank else ""
    print(f"flatops {command}{where}: {message}", file=sys.stderr)
    return 2


def usage() -> str:
    """The text of `flatops --help`."""
    lines = [f"  {name:<11}{command.__doc__}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: flatops COMMAND [OPTIONS]", "", *lines, "", "flatops COMMAND --help lists its options."])
