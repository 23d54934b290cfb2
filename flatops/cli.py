"""The command `flatops`: each part loads what it needs, and a mistake costs one line, not a traceback."""

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
# Which of pip's extras has what may be missing.
EXTRA = dict.fromkeys(
    ("matplotlib", "numpy", "PIL", "rich", "sklearn", "timm", "tomli", "torchvision", "tyro"), "train"
) | {"plotly": "landscape", "tensorboard": "tensorboard", "pytorch_optimizer": "test"}


@dataclass
class InfoConfig:
    """Show the versions, what was built, the SIMD level, threads, devices and the backend of each."""

    json: bool = False
    """Print JSON."""


def parse(config_type: type[C], command: str, arguments: list[str], default: C | None = None) -> C:
    """A configuration from the command line; what is left out comes from `default`."""
    import tyro

    style = (tyro.conf.DisallowNone, tyro.conf.FlagCreatePairsOff)
    return tyro.cli(
        config_type,
        prog=f"flatops {command}",
        args=arguments,
        default=default,
        config=style,
        console_outputs=distributed.launched()[0] == 0,
    )


def info(arguments: list[str]) -> int:
    """show what was built and what runs where"""
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

    default = TrainConfig()  # where options come from that the command line does not give
    resume, preset, method = (given(arguments, name) for name in ("resume", "preset", "method"))
    if resume and preset:
        raise ValueError("a run that is resumed has its options: leave out preset")
    if resume:
        default = checkpoint.unpack_config(checkpoint.read(Path(resume)), Path(resume))
    elif preset:
        default = presets.recipe(preset)
        if method in METHODS:  # options of the preset's own method may not apply to another
            default = with_method(default, method)
    command = parse(TrainCommand, "train", arguments, TrainCommand(**vars(default)))
    config = TrainConfig(**{name: getattr(command, name) for name in vars(default)})
    profile(config) if command.profile else train(config)
    return 0


*_labels, _last = (method.label for method in METHODS.values())
train.__doc__ = f"train a network with {', '.join(_labels)} or {_last}"


def given(arguments: list[str], option: str) -> str | None:
    """The value of one option, before the others can be understood."""
    parser = argparse.ArgumentParser(prog="flatops train", add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{option}")
    return getattr(parser.parse_known_args(arguments)[0], option)


def compare(arguments: list[str]) -> int:
    """train several methods over several seeds and compare them"""
    from flatops.train import CompareConfig, compare

    compare(parse(CompareConfig, "compare", arguments))
    return 0


def landscape(arguments: list[str]) -> int:
    """draw the loss around trained networks: curves, surfaces, sharpness, top eigenvalue"""
    from flatops.landscape.config import LandscapeConfig

    config = parse(LandscapeConfig, "landscape", arguments)
    from flatops.landscape.run import landscape  # needs plotly, which --help does not

    landscape(config)
    return 0


def bench(arguments: list[str]) -> int:
    """measure the kernels on this machine"""
    from flatops.benchmarks import bench, command

    return command.main(parse(bench.Config, "bench", arguments))


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "info": info,
    "train": train,
    "compare": compare,
    "landscape": landscape,
    "bench": bench,
}


def main(arguments: list[str] | None = None) -> int:
    """Run a sub-command and return its exit status: 0, 2 after a user's mistake, 130 after Ctrl-C."""
    terminal.take_any_text()
    os.environ["MPLBACKEND"] = "agg"  # pictures go to files; a notebook's backend may not be installed here
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
    """The sub-commands and what they do."""
    lines = [f"  {name:<11}{command.__doc__}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: flatops COMMAND [OPTIONS]", "", *lines, "", "flatops COMMAND --help lists its options."])
