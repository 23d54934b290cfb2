"""What machine code tells about GPU kernels without a GPU: registers, spills, access widths, instructions, and a time.

python -m flatops.benchmarks.machine_code [FILE ...]   prints docs/performance.md's table, of flatops by default

The model counts instructions. A multiprocessor issues four warp instructions per clock, and each kind of instruction
has its own, lower rate; memory moves the required bytes at the rate of a copy. A kernel takes at least the longer of
the two times, and a good one little more.
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
    """The model's numbers for an H100 (SXM). `rates`: threads per clock of a multiprocessor, by pipe."""

    multiprocessors: int = 132
    hertz: float = 1.755e9
    bytes_per_second: float = 3.0e12
    registers: int = 65536  # per multiprocessor
    warps: int = 64


# imad: integer multiplies, which use half of the fp32 units. Opcodes not listed here are limited by issue alone.
RATES = {"issue": 128, "fp32": 128, "imad": 64, "alu": 64, "fp64": 64, "xu": 16, "memory": 32}
PIPES = {
    "fp32": "FFMA FMUL FADD HFMA2",
    "imad": "IMAD",
    "alu": "LOP3 PLOP3 IADD3 VIADD SHF ISETP SEL PRMT FSETP FSEL FMNMX IMNMX VIMNMX LEA MOV IABS SGXT BMSK I2FP F2FP "
    "P2R R2P VOTE CS2R",
    "fp64": "DFMA DMUL DADD DSETP",
    "xu": "MUFU I2F F2I F2F FRND POPC FLO BREV FCHK",
    "memory": "LDG STG LD ST LDS STS LDL STL LDC LDGSTS LDSM ATOM ATOMG ATOMS RED REDG SHFL",
}
PIPE_OF = {opcode: pipe for pipe, opcodes in PIPES.items() for opcode in opcodes.split()}


@dataclass(frozen=True)
class Instruction:
    """One line of machine code."""

    address: int
    opcode: str  # with modifiers, such as LDG.E.128
    operands: str
    predicated: bool  # executed by some threads only, but issued for the whole warp

    @property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.split(".")[0]

    @property
    def pipe(self) -> str:
        """The units that execute it; 'control' where none is modelled."""
        return PIPE_OF.get(self.name, "control")

    @property
    def bits(self) -> int:
        """Bits that a load or store moves per thread."""
        width = re.search(r"\.[US]?(8|16|64|128|256)\b", self.opcode)
        return int(width[1]) if width else 32

    @property
    def target(self) -> int | None:
        """The address in the kernel that it may jump to. None for calls, which return, and without a jump."""
        address = re.search(r"(0x[0-9a-f]+)\s*$", self.operands)
        return int(address[1], 16) if self.name == "BRA" and address else None

    @property
    def ends(self) -> bool:
        """Whether execution never continues with the next instruction."""
        if self.predicated or re.match(r"!?U?P\d", self.operands):  # BRA !P0, 0x100 may continue
            return False
        jumps = self.target is not None and "DIV" not in self.opcode
        return jumps or self.name in ("EXIT", "RET", "BRX", "KILL")


@dataclass(frozen=True)
class Kernel:
    """The resources and code of one kernel."""

    name: str  # mangled
    arch: str
    registers: int  # per thread
    shared: int  # bytes, including the 1,024 that the system reserves
    stack: int  # bytes
    code: tuple[Instruction, ...]

    @cached_property
    def instructions(self) -> Counter[str]:
        """How often each opcode occurs in the code, with modifiers."""
        return Counter(i.opcode for i in self.code)

    @cached_property
    def spills(self) -> int:
        """Accesses to local memory: spilled registers, or arrays indexed at run time."""
        return sum(i.name in ("LDL", "STL") for i in self.code)

    @cached_property
    def loads(self) -> Counter[int]:
        """Width in bits -> number of loads from global memory in the code."""
        return Counter(i.bits for i in self.code if i.name in ("LDG", "LD", "LDGSTS"))

    @cached_property
    def stores(self) -> Counter[int]:
        """Width in bits -> number of stores to global memory in the code."""
        return Counter(i.bits for i in self.code if i.name in ("STG", "ST"))

    @property
    def warps(self) -> int:
        """Warps that the registers of a multiprocessor suffice for."""
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
        """The blocks that can be reached without those in `without`, ignoring the paths of diverged warps (BRA.DIV)."""
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
        """First blocks of the longer of two paths with as many wide accesses (as for unaligned tiles)."""
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
        """What a thread with a whole, aligned tile executes, with counts: an upper bound.

        Left out, as long as every wide access on the path and the end stay reachable: the longer of two paths
        with as many wide accesses, slow paths that call a function, and narrow accesses. For any other branch both
        sides count. Loops run `trips` times.
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
        loops = [  # from the target of a backward jump to the jump; a kernel ends with a jump to itself
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
    """The path of a CUDA tool: the toolkit's, or the one that Triton ships."""
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
        arch: such as 'sm_90'; by default the last one in the file.

    Raises:
        FileNotFoundError: cuobjdump is not installed.
        subprocess.CalledProcessError: cuobjdump cannot read the file.
    """
    program = tool()
    if program is None:
        raise FileNotFoundError("there is no cuobjdump: install a CUDA toolkit or Triton")
    only = ["-arch", arch] if arch else []
    command = [program, "-res-usage", "-sass", *only, str(path)]
    return parse(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def parse(text: str) -> dict[str, Kernel]:
    """Parses the output of cuobjdump."""
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
        # In a cubin the architecture comes after the resources.
        used = resources.get((arch, name)) or resources.get(("", name), without)
        found[name] = Kernel(name, arch, used["REG"], used["SHARED"], used["STACK"], tuple(lines))
    return found


def by_pipe(path: Counter[Instruction], elements: int) -> dict[str, float]:
    """Instructions per element by pipe, and their total as 'issue'."""
    pipes: Counter[str] = Counter()
    for instruction, times in path.items():
        pipes[instruction.pipe] += times
    return {"issue": path.total() / elements} | {pipe: n / elements for pipe, n in pipes.items()}


@dataclass(frozen=True)
class Prediction:
    """The shortest time of a kernel in microseconds."""

    arithmetic: float
    memory: float
    pipe: str  # the busiest one


def predict(pipes: dict[str, float], bytes_per_element: float, elements: int, gpu: Gpu = Gpu()) -> Prediction:
    """Predicts a GPU's time from instructions and bytes per element.

    Args:
        pipes: from `by_pipe`.
        bytes_per_element: bytes that have to move.
        elements: number of elements.
    """
    clocks = {pipe: n / RATES[pipe] for pipe, n in pipes.items() if pipe in RATES}
    clocks["fp32"] = (pipes.get("fp32", 0) + pipes.get("imad", 0)) / RATES["fp32"]  # they share units
    pipe = max(clocks, key=lambda p: clocks[p])
    seconds = clocks[pipe] * elements / (gpu.multiprocessors * gpu.hertz)
    return Prediction(seconds * 1e6, bytes_per_element * elements / gpu.bytes_per_second * 1e6, pipe)


# --- flatops' own kernels ---------------------------------------------------------------------------------------------

# Operator, its kernel on float32 with the short table, weights per thread, bytes per weight, trips of its loop (the
# binary search for a block's tensor, log2(161)). Small kernels that finish a sum are left out.
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
    """One row per operator of flatops whose kernel is in `found`, with the shortest time on an H100."""
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
                "instructions": pipes["issue"],  # per weight
                "slowest": next(iter(times.values())).pipe,
                "us": {model: [each.arithmetic, each.memory] for model, each in times.items()},
            }
        )
    return result


def measure() -> dict[str, Any]:
    """The rows of flatops' extension; none if it has no code for an H100, or without cuobjdump."""
    from flatops.backend import _C

    readable = "sm_90" in getattr(_C, "cuda_archs", ()) and tool()
    return {**provenance(), "rows": rows(kernels(_C.__file__, "sm_90")) if readable else []}


def table(rows: list[dict[str, Any]]) -> str:
    """The table in Markdown."""
    head = ["operator", "registers", "warps", "spills", "loads", "stores", *COLUMNS, "all", "slowest"]
    head += [f"{model}: arithmetic, memory (µs)" for model in MODELS]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        resources = [str(row[key]) for key in ("name", "registers", "warps", "spills", "loads", "stores")]
        counts = [f"{each:.1f}" for each in (*row["pipes"].values(), row["instructions"])]
        lines.append([*resources, *counts, row["slowest"], *map(microseconds, row["us"].values())])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def microseconds(pair: Sequence[float]) -> str:
    """Arithmetic and memory time."""
    return ", ".join(f"{each:.0f}" for each in pair)


def _widths(path: Iterable[Instruction], name: str) -> str:
    """The widths of the accesses on a path, such as '8 × 128, 1 × 32'."""
    widths = Counter(i.bits for i in path if i.name == name)
    return ", ".join(f"{n} × {bits}" for bits, n in sorted(widths.items(), reverse=True)) or "none"


def main(files: list[str]) -> None:
    """Prints the table for the kernels in these files, or in flatops' extension."""
    if not files:
        from flatops.backend import _C

        if _C is None:
            sys.exit("flatops has no compiled core: see flatops info")
        files = [_C.__file__]
    print(table(rows({name: kernel for file in files for name, kernel in kernels(file, "sm_90").items()})))


if __name__ == "__main__":
    main(sys.argv[1:])
