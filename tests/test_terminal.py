"""Output of commands: on terminals of any encoding, with names that look like markup, with a notebook's settings."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from flatops import cli, terminal
from flatops.train import TrainConfig, train

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ("[bold]a :smile:", "[b] $y_^$ é")  # markup of rich, its emoji, and mathematics of matplotlib
QUICK = ("--points", "3", "--batches", "1", "--batch-size", "32", "--draws", "2", "--iterations", "2")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of one epoch."""
    folder, threads = tmp_path_factory.mktemp("runs"), torch.get_num_threads()
    for seed, name in enumerate(NAMES):
        train(TrainConfig(epochs=1, batch_size=512, seed=seed, output=folder / name), Console(file=io.StringIO()))
    torch.set_num_threads(threads)
    return [folder / name for name in NAMES]


@contextlib.contextmanager
def terminal_of(encoding: str):
    """Replaces standard output and error by a terminal of an encoding; yields what it has shown."""
    shown: list[str] = []
    screen = io.BytesIO()
    streams = [
        io.TextIOWrapper(screen, encoding, errors, write_through=True) for errors in ("strict", "backslashreplace")
    ]
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        yield shown
    shown.append(screen.getvalue().decode(encoding))


def spelt(text: str, encoding: str) -> str:
    return text.encode(encoding, terminal.ERRORS).decode(encoding)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437", "cp1252", "utf-8"])
def test_the_help_of_every_command_and_info(encoding):
    with terminal_of(encoding) as shown:
        assert cli.main([]) == cli.main(["info"]) == 0
        for command in cli.COMMANDS:
            with pytest.raises(SystemExit) as ended:
                cli.main([command, "--help"])
            assert ended.value.code == 0
    [text] = shown
    assert all(f"usage: flatops {command}" in text for command in ("COMMAND", *cli.COMMANDS))
    assert spelt("→  backend", encoding) in text and spelt("digits, 8×8", encoding) in text


@pytest.mark.parametrize("encoding", ["ascii", "cp437"])
def test_names_are_printed_literally(encoding, runs, tmp_path):
    output = tmp_path / "[red]x[/red] :x: σ"
    some = ["--methods", "sgd", "mrwp", "--seeds", "1", "--epochs", "1", "--batch-size", "512"]
    with terminal_of(encoding) as shown:
        assert cli.main(["train", "--resume", str(runs[0]), "--output", str(output / "run")]) == 0
        assert cli.main(["train", "--resume", str(tmp_path / "none[x]")]) == 2
        assert cli.main(["landscape", *map(str, runs), *QUICK, "--output", str(output)]) == 0
        assert cli.main(["compare", *some, "--output", str(output)]) == 0
    [text], place = shown, spelt(str(output), encoding)
    for line in (
        f"see {place}/run",
        f"Written to {place}: ",
        f"Written to {place}/compare.json",
        f"no checkpoint at {tmp_path}/none[x]",
    ):
        assert line in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(row) for row in rows if "training" in row and "images" not in row}) == 1  # columns are aligned
    names = "".join(row.split("|")[1].replace(" ", "") for row in rows)  # names are folded
    assert all(name.replace(" ", "") in names for name in ("[bold]a :smile:", "[b] $y_^$"))
    result = json.loads((output / "landscape.json").read_text(encoding="utf-8"))
    assert [network["name"] for network in result["networks"]] == [f"SGD ({name})" for name in NAMES]


def test_a_console_of_the_caller_prints_names_literally(runs, tmp_path):
    """With markup on, which is rich's default."""
    console = Console(file=io.StringIO(), width=200)
    output = tmp_path / "[red]x[/red]"
    train(TrainConfig(epochs=1, batch_size=512, output=output), console)
    assert f"see {output}" in console.file.getvalue()


def test_names_that_are_not_utf_8(runs, tmp_path):
    """On the terminal, in a picture, on a page and in JSON."""
    links = [tmp_path / os.fsdecode(name) for name in (b"\xe9", b"\xff[x]")]
    for link, run in zip(links, runs):
        link.symlink_to(run)
    output = tmp_path / os.fsdecode(b"out\xe9")
    with terminal_of("latin-1") as shown:
        assert cli.main(["landscape", *map(str, links), *QUICK, "--output", str(output)]) == 0
    assert f"Written to {tmp_path}/out\xe9: " in shown[0]  # the original byte
    result = json.loads((output / "landscape.json").read_text(encoding="utf-8"))
    assert [network["name"] for network in result["networks"]] == ["SGD (\ufffd)", "SGD (\ufffd[x])"]
    assert [Path(network["checkpoint"]) for network in result["networks"]] == links
    assert Path(result["config"]["output"]) == output


def test_characters_that_an_encoding_lacks_are_spelt_out():
    assert spelt("8×8 → σ 0.1 ± 2 … é \u4e2d", "ascii") == r"8x8 -> sigma 0.1 +- 2 ... \xe9 \u4e2d"
    assert "a\udce9".encode("ascii", terminal.ERRORS) == b"a\xe9"
    with pytest.raises(UnicodeDecodeError):
        b"\xff".decode("utf-8", terminal.ERRORS)


def test_the_c_locale_and_a_notebooks_backend(tmp_path):
    """In a separate process, because both are chosen when Python and matplotlib are loaded."""
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment["MPLBACKEND"] = "module://a_notebook.backend"
    output = os.fsencode(tmp_path) + b"/caf\xc3\xa9[x]\xe9"
    command = [sys.executable, "-m", "flatops", "train", "--epochs", "1", "--batch-size", "512", "--output", output]
    done = subprocess.run(command, check=False, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert b"see " + output in done.stdout and os.path.isfile(output + b"/curves.png")
