"""What can be known of a GPU's kernels without a GPU: registers, spills, the width of accesses, instructions, and from them a time.

python -m flatops.benchmarks.machine_code [FILE ...]   prints docs/performance.md's table, of flatops' own extension by default

The model counts. A multiprocessor issues four warp instructions a clock, and each kind of instruction has its own rate below
that; memory moves what it must at the rate that a copy reaches. A kernel takes no less than the slower of the two, and a good
one little more.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from flatops.benchmarks.measure import provenance

WARP = 32


@dataclass(frozen=True)
class Gpu:
    """What the model takes for an H100 (SXM). `rates`: threads whose instruction a multiprocessor takes up in one clock."""

    multiprocessors: int = 132
    hertz: float = 1.755e9
    bytes_per_second: float = 3.0e12
    registers: int = 65536  # of a multiprocessor
    warps: int = 64


# imad: integer multiplies, which go through one half of the units of fp32. What is not here is limited by issue alone.
RATES = {"issue": 128, "fp32": 128, "imad": 64, "alu": 64, "fp64": 64, "xu": 16, "memory": 32}
PIPES = {
    "fp32": "FFMA FMUL FADD HFMA2",
    "imad": "IMAD",
    "alu": "LOP3 PLOP3 IADD3 VIADD SHF ISETP SEL PRMT FSETP FSEL FMNMX IMNMX VIMNMX LEA MOV IABS SGXT BMSK I2FP F2FP P2R R2P "
    "VOTE CS2R",
    "fp64": "DFMA DMUL DADD DSETP",
    "xu": "MUFU I2F F2I F2F FRND POPC FLO BREV FCHK",
    "memory": "LDG STG LD ST LDS STS LDL STL LDC LDGSTS LDSM ATOM ATOMG ATOMS RED REDG SHFL",
}
PIPE_OF = {opcode: pipe for pipe, opcodes in PIPES.items() for opcode in opcodes.split()}


@dataclass(frozen=True)
class Instruction:
    """One line of machine code."""

    address: int
    opcode: str  # with its modifiers, such as LDG.E.128
    operands: str
    predicated: bool  # carried out by some threads alone; it is issued all the same

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.split(".")[0]

    @property
    def pipe(self) -> str:
        """Which units it keeps busy, 'control' if none that counts."""
        return PIPE_OF.get(self.name, "control")

    @property
    def bits(self) -> int:
        """How much a load or a store moves for one thread."""
        width = re.search(r"\.[US]?(8|16|64|128|256)\b", self.opcode)
        return int(width[1]) if width else 32

    @property
    def target(self) -> int | None:
        """Where it may jump to within the kernel; None of a call, which comes back, and of all that does not jump."""
        address = re.search(r"(0x[0-9a-f]+)\s*$", self.operands)
        return int(address[1], 16) if self.name == "BRA" and address else None

    @property
    def ends(self) -> bool:
        """Whether what follows it is never reached by going on."""
        if self.predicated or re.match(r"!?U?P\d", self.operands):  # BRA !P0, 0x100 goes on as well
            return False
        jumps = self.target is not None and "DIV" not in self.opcode
        return jumps or self.name in ("EXIT", "RET", "BRX", "KILL")


@dataclass(frozen=True)
class Kernel:
    """One kernel's resources and code."""

    name: str  # mangled
    arch: str
    registers: int  # a thread
    shared: int  # bytes, with the 1,024 that the system takes
    stack: int  # bytes
    code: tuple[Instruction, ...]

    @cached_property
    def instructions(self) -> Counter[str]:
        """How often each opcode stands in the code, modifiers included."""
        return Counter(i.opcode for i in self.code)

    @cached_property
    def spills(self) -> int:
        """Accesses of local memory: registers that ran out, or arrays with indices not known beforehand."""
        return sum(i.name in ("LDL", "STL") for i in self.code)

    @cached_property
    def loads(self) -> Counter[int]:
        """Width in bits -> how many loads from global memory stand in the code."""
        return Counter(i.bits for i in self.code if i.name in ("LDG", "LD", "LDGSTS"))

    @cached_property
    def stores(self) -> Counter[int]:
        """Width in bits -> how many stores to global memory stand in the code."""
        return Counter(i.bits for i in self.code if i.name in ("STG", "ST"))

    @property
    def warps(self) -> int:
        """Warps that a multiprocessor has registers for."""
        return min(Gpu.warps, Gpu.registers // (-(-self.registers // 8) * 8 * WARP))

    @cached_property
    def blocks(self) -> list[tuple[Instruction, ...]]:
        """The code in basic blocks."""
        starts = {i.target for i in self.code} | {
            b.address for a, b in zip(self.code, self.code[1:]) if a.target is not None or a.ends or a.name == "EXIT"
        }
        blocks: list[list[Instruction]] = []
        for i in self.code:
            if not blocks or i.address in starts:
                blocks.append([])
            blocks[-1].append(i)
        return [tuple(block) for block in blocks]

    def _reached(self, without: Collection[int] = ()) -> set[int]:
        """Which blocks can be reached if some are closed. Where a warp has come apart (BRA.DIV) is not the way."""
        at = {block[0].address: n for n, block in enumerate(self.blocks)}
        reached: set[int] = set()
        todo = [0]
        while todo:
            n = todo.pop()
            if n in reached or n in without or n >= len(self.blocks):
                continue
            reached.add(n)
            last = self.blocks[n][-1]
            if last.target in at and "DIV" not in last.opcode:
                todo.append(at[last.target])
            if not last.ends:
                todo.append(n + 1)
        return reached

    def _longer_ways(self, wide: list[int], ends: list[int]) -> set[int]:
        """Where not to go: the first blocks of alternatives, such as code for what is not aligned, that move as much in more steps."""
        at = {block[0].address: n for n, block in enumerate(self.blocks)}
        closed: set[int] = set()
        for n, block in enumerate(self.blocks):
            here = self._reached(closed)
            target = at.get(block[-1].target)
            if n not in here or target is None or block[-1].ends or "DIV" in block[-1].opcode:
                continue
            without = {side: self._reached(closed | {side}) for side in (n + 1, target)}
            moved = {side: sum(w in reached for w in wide) for side, reached in without.items()}
            twins = all(2 * n == sum(w in here for w in wide) > 0 for n in moved.values())
            if twins and all(not reached.isdisjoint(ends) for reached in without.values()):
                length = {side: sum(len(self.blocks[b]) for b in without[side]) for side in without}
                closed.add(min(length, key=lambda side: length[side]))
        return closed

    def path(self, trips: int = 1) -> Counter[Instruction]:
        """What a thread with a whole and aligned tile runs, each instruction with how often: an upper bound.

        Left out is what can be: of two ways with as many wide accesses the longer one; slow paths, which call something,
        and narrow accesses, as long as every wide access on the way and the end stay within reach. Both sides of any
        other choice count. Loops run `trips` times.
        """
        accesses = [
            (n, i)
            for n, block in enumerate(self.blocks)
            for i in block
            if i.name in ("LDG", "STG", "LD", "ST", "LDGSTS")
        ]
        widest = max((i.bits for _, i in accesses), default=0)
        ends = [n for n, block in enumerate(self.blocks) if any(i.name == "EXIT" for i in block)]
        closed = self._longer_ways([n for n, i in accesses if i.bits == widest], ends)
        wide = {n for n, i in accesses if i.bits == widest} & self._reached(closed)
        calls = {n for n, block in enumerate(self.blocks) if any(i.name == "CALL" for i in block)}
        for n in sorted(calls | {n for n, _ in accesses} - wide):
            reached = self._reached(closed | {n})
            if wide <= reached and not reached.isdisjoint(ends):
                closed.add(n)
        reached = self._reached(closed)
        loops = [  # from where a jump back leads to the jump; a kernel ends with one to itself
            range(i.target, i.address + 1)
            for n in reached
            for i in self.blocks[n]
            if i.target is not None and i.target < i.address
        ]
        path: Counter[Instruction] = Counter()
        for n in reached:
            for i in self.blocks[n]:
                path[i] = trips ** sum(i.address in loop for loop in loops)
        return path


def tool(name: str = "cuobjdump") -> str | None:
    """Where a program of the CUDA toolkit is: the toolkit's own, or the one that Triton carries."""
    triton = importlib.util.find_spec("triton")
    folders = [
        os.environ.get("PATH", os.defpath),
        *(str(Path(home, "bin")) for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home),
        *(str(Path(folder, "backends/nvidia/bin")) for folder in (triton.submodule_search_locations if triton else ())),
    ]
    return shutil.which(name, path=os.pathsep.join(folders))


LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;")


def kernels(path: Path | str, arch: str | None = None) -> dict[str, Kernel]:
    """The kernels in a cubin, an object or a shared library, by mangled name.

    Args:
        path: the file.
        arch: such as 'sm_90'; of several in a file the last one counts otherwise.

    Raises:
        FileNotFoundError: there is no cuobjdump.
        subprocess.CalledProcessError: cuobjdump cannot read the file.
    """
    program = tool()
    if program is None:
        raise FileNotFoundError("there is no cuobjdump: install a CUDA toolkit or Triton")
    only = ["-arch", arch] if arch else []
    command = [program, "-res-usage", "-sass", *only, str(path)]
    return parse(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def parse(text: str) -> dict[str, Kernel]:
    """The kernels in what cuobjdump prints."""
    resources: dict[tuple[str, str], dict[str, int]] = {}
    code: dict[tuple[str, str], list[Instruction]] = {}
    arch, key, lines = "", ("", ""), None
    for line in text.splitlines():
        if found := re.match(r"\s*(?:arch = |code for )(sm_\w+)", line):
            arch = found[1]
        elif found := re.match(r"\s*Function (\S+):$", line):
            key = (arch, found[1])
        elif re.match(r"\s*REG:\d", line):
            resources[key] = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", line)}
        elif found := re.match(r"\s*Function : (\S+)$", line):
            lines = code.setdefault((arch, found[1]), [])
        elif lines is not None and (found := LINE.match(line)):
            lines.append(Instruction(int(found[1], 16), found[3], found[4], found[2] is not None))
    without = {"REG": 0, "SHARED": 0, "STACK": 0}
    found = {}
    for (arch, name), lines in code.items():
        used = resources.get((arch, name)) or resources.get(("", name), without)  # a cubin tells its arch too late
        found[name] = Kernel(name, arch, used["REG"], used["SHARED"], used["STACK"], tuple(lines))
    return found


def by_pipe(path: Counter[Instruction], elements: int) -> dict[str, float]:
    """Instructions an element by pipe, and all of them as 'issue'."""
    pipes: Counter[str] = Counter()
    for instruction, times in path.items():
        pipes[instruction.pipe] += times
    return {"issue": path.total() / elements} | {pipe: n / elements for pipe, n in pipes.items()}


@dataclass(frozen=True)
class Prediction:
    """Microseconds that a kernel takes at least."""

    arithmetic: float
    memory: float
    pipe: str  # which one is busy longest


def predict(pipes: dict[str, float], bytes_per_element: float, elements: int, gpu: Gpu = Gpu()) -> Prediction:
    """Time on a GPU from instructions and bytes an element.

    Args:
        pipes: from `by_pipe`.
        bytes_per_element: that have to move.
        elements: how many there are.
    """
    clocks = {pipe: n / RATES[pipe] for pipe, n in pipes.items() if pipe in RATES}
    clocks["fp32"] = (pipes.get("fp32", 0) + pipes.get("imad", 0)) / RATES["fp32"]  # they share units
    pipe = max(clocks, key=lambda p: clocks[p])
    seconds = clocks[pipe] * elements / (gpu.multiprocessors * gpu.hertz)
    return Prediction(seconds * 1e6, bytes_per_element * elements / gpu.bytes_per_second * 1e6, pipe)


# --- flatops' own kernels ------------------------------------------------------------------------------------------------

# operator, its kernel on float32 in the short table, weights a thread, bytes a weight, how often a loop runs: the search of the
# table for a block's tensor, log2(161). Small kernels that finish a sum are left out.
OPERATORS = [
    ("perturb_", r"perturbIfL.*ModeE0ELi168E", 32, 8),
    ("perturb_ with backup", r"perturbIfL.*ModeE0ELi168E", 32, 12),
    ("restore_", r"4copyIfLi168E", 16, 8),
    ("restore_, regenerating", r"perturbIfL.*ModeE1ELi168E", 32, 8),
    ("filter_norms, filter_fisher_", r"filter_sumsIfLi168E", 32, 4),
    ("grad_norm", r"part_sumsIfLb0ELi168E", 32, 4),
    ("ascend_", r"ascendIfLi168E", 16, 12),
    ("ascend_ with backup", r"ascendIfLi168E", 16, 16),
    ("normals alone", r"perturbIfL.*ModeE2ELi168E", 32, 4),
]
SEARCH = 8
MODELS = {"ResNet-50": 25_557_032, "ViT-B": 86_567_656}


COLUMNS = (*PIPES, "control")


def rows(found: dict[str, Kernel]) -> list[dict[str, Any]]:
    """A row for each of flatops' operators whose kernel is among `found`, with what it takes an H100 at least."""
    result = []
    for operator, pattern, elements, bytes_per_weight in OPERATORS:
        kernel = next((k for name, k in found.items() if re.search(pattern, name)), None)
        if kernel is None:
            continue
        path = kernel.path(SEARCH)
        pipes = by_pipe(path, elements)
        times = {model: predict(pipes, bytes_per_weight, weights) for model, weights in MODELS.items()}
        result.append(
            {
                "name": operator,
                "registers": kernel.registers,
                "warps": kernel.warps,
                "spills": kernel.spills,
                "loads": _widths(path, "LDG"),
                "stores": _widths(path, "STG"),
                "pipes": {pipe: pipes.get(pipe, 0.0) for pipe in COLUMNS},
                "instructions": pipes["issue"],  # a weight
                "slowest": next(iter(times.values())).pipe,
                "us": {model: [each.arithmetic, each.memory] for model, each in times.items()},
            }
        )
    return result


def measure() -> dict[str, Any]:
    """The rows of flatops' extension; none where it has no code for an H100 or nothing here can read it."""
    from flatops.backend import _C

    readable = "sm_90" in getattr(_C, "cuda_archs", ()) and tool()
    return {**provenance(), "rows": rows(kernels(_C.__file__, "sm_90")) if readable else []}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    head = ["operator", "registers", "warps", "spills", "loads", "stores", *COLUMNS, "all", "slowest"]
    head += [f"{model}: arithmetic, memory (µs)" for model in MODELS]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        resources = [str(row[key]) for key in ("name", "registers", "warps", "spills", "loads", "stores")]
        counts = [f"{each:.1f}" for each in (*row["pipes"].values(), row["instructions"])]
        lines.append([*resources, *counts, row["slowest"], *map(microseconds, row["us"].values())])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def microseconds(pair: Sequence[float]) -> str:
    """Of arithmetic and of memory."""
    return ", ".join(f"{each:.0f}" for each in pair)


def _widths(path: Iterable[Instruction], name: str) -> str:
    """How wide the accesses on a path are, such as '8 × 128, 1 × 32'."""
    widths = Counter(i.bits for i in path if i.name == name)
    return ", ".join(f"{n} × {bits}" for bits, n in sorted(widths.items(), reverse=True)) or "none"


def main(files: list[str]) -> None:
    """Prints the table of the kernels in these files, or in flatops' extension."""
    if not files:
        from flatops.backend import _C

        if _C is None:
            sys.exit("flatops has no compiled core: see flatops info")
        files = [_C.__file__]
    print(table(rows({name: kernel for file in files for name, kernel in kernels(file, "sm_90").items()})))


if __name__ == "__main__":
    main(sys.argv[1:])
