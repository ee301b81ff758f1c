"""What nvcc made of every kernel: registers, memory, and the instructions that matter, by SASS.

python tests/python/cuda_resources.py [FILE]    FILE: an object, library or extension with kernels

Without FILE the installed extension is read. Needs cuobjdump and nvdisasm, of a CUDA toolkit or of
the packages nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm, which `pip install '.[test]'` brings:
without them the exit status is 77.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

REGISTERS_PER_MULTIPROCESSOR = 65536  # of every architecture that is built
SKIPPED = 77  # the exit status of "nothing was checked", as test drivers know it
_WARP, _REGISTERS_AT_A_TIME = 32, 8  # registers of a thread are allocated by eights


class ToolMissing(Exception):
    """There is no cuobjdump, or no nvdisasm, which it calls."""


@dataclass
class Kernel:
    """One kernel for one architecture.

    Attributes:
        threads: of a thread block at most, by its launch bounds.
        shared_bytes: static; from sm_90 on this counts 1 KB that the system reserves.
        opcodes: how often each instruction occurs, with its modifiers: "LDG.E.128".
    """

    architecture: str
    symbol: str
    name: str = ""
    threads: int = 0
    registers: int = 0
    stack_bytes: int = 0
    shared_bytes: int = 0
    opcodes: Counter[str] = field(default_factory=Counter)

    def count(self, pattern: str) -> int:
        """How many instructions match a regular expression, whole."""
        return sum(n for opcode, n in self.opcodes.items() if re.fullmatch(pattern, opcode))

    @property
    def local_accesses(self) -> int:
        """Loads and stores of local memory: spilled registers, or arrays that are indexed."""
        return self.count(r"(LDL|STL)(\..*)?")

    @property
    def generic_accesses(self) -> int:
        """Loads and stores whose address space the compiler did not find out: slower ones."""
        return self.count(r"(LD|ST)(\..*)?")

    @property
    def thread_blocks(self) -> int:
        """That a multiprocessor's registers are enough for; 0 without launch bounds."""
        if self.threads == 0:
            return 0
        threads = -(-self.threads // _WARP) * _WARP
        registers = -(-self.registers // _REGISTERS_AT_A_TIME) * _REGISTERS_AT_A_TIME
        return REGISTERS_PER_MULTIPROCESSOR // (threads * registers)

    def widest(self, opcode: str) -> int:
        """The most bytes that one LDG or STG (`opcode`) of a thread moves; 0: there is none."""
        widths = [_access_bytes(one) for one in self.opcodes if one.split(".")[0] == opcode]
        return max(widths, default=0)


def read_kernels(path: Path) -> list[Kernel]:
    """Every kernel of a file, for every architecture that it has machine code for.

    Raises:
        ToolMissing: see there.
        RuntimeError: the file cannot be read.
    """
    kernels: dict[tuple[str, str], Kernel] = {}
    for kernel in parse_resources(_cuobjdump("--dump-resource-usage", path)):
        kernels[kernel.architecture, kernel.symbol] = kernel
    for key, threads in parse_launch_bounds(_cuobjdump("--dump-elf", path)):
        kernels[key].threads = threads
    for key, opcode in parse_sass(_cuobjdump("--dump-sass", path)):
        kernels[key].opcodes[opcode] += 1
    names = demangle([kernel.symbol for kernel in kernels.values()])
    for kernel in kernels.values():
        kernel.name = names[kernel.symbol]
    return sorted(kernels.values(), key=lambda one: (one.name, _number(one.architecture)))


_ARCHITECTURE = re.compile(r"^\s*arch = (sm_\w+)")


def parse_resources(lines: Iterable[str]) -> Iterator[Kernel]:
    """Of cuobjdump --dump-resource-usage."""
    architecture = symbol = ""
    for line in lines:
        if found := _ARCHITECTURE.match(line):
            architecture = found[1]
        elif found := re.match(r"\s*Function (\S+):", line):
            symbol = found[1]
        elif symbol and (found := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) ", line)):
            registers, stack, shared = (int(number) for number in found.groups())
            yield Kernel(
                architecture, symbol, registers=registers, stack_bytes=stack, shared_bytes=shared
            )
            symbol = ""


def parse_launch_bounds(lines: Iterable[str]) -> Iterator[tuple[tuple[str, str], int]]:
    """Of cuobjdump --dump-elf: (architecture, symbol) and the most threads of a thread block."""
    architecture = symbol = ""
    is_next = False
    for line in lines:
        if found := _ARCHITECTURE.match(line):
            architecture = found[1]
        elif found := re.match(r"\.nv\.info\.(\S+)$", line):
            symbol = found[1]
        elif "EIATTR_MAX_THREADS" in line:
            is_next = True
        elif is_next and (found := re.match(r"\s*Value:\s+(0x\w+) (0x\w+) (0x\w+)", line)):
            x, y, z = (int(size, 16) for size in found.groups())
            yield (architecture, symbol), x * y * z
            is_next = False


def parse_sass(lines: Iterable[str]) -> Iterator[tuple[tuple[str, str], str]]:
    """Of cuobjdump --dump-sass: (architecture, symbol) and an instruction, one by one."""
    architecture = symbol = ""
    for line in lines:
        if found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", line):
            yield (architecture, symbol), found[1]
        elif found := _ARCHITECTURE.match(line):
            architecture = found[1]
        elif found := re.match(r"\s*Function : (\S+)", line):
            symbol = found[1]


def demangle(symbols: list[str]) -> dict[str, str]:
    """Short names: "nf4_dequantize_kernel<float, true>", or the symbol where nobody demangles."""
    tool = shutil.which("c++filt")
    if tool is None or not symbols:
        return {symbol: symbol for symbol in symbols}
    text = "\n".join(symbols)
    done = subprocess.run([tool], input=text, capture_output=True, text=True, check=True)
    return {
        symbol: short_name(name)
        for symbol, name in zip(symbols, done.stdout.splitlines(), strict=True)
    }


def short_name(name: str) -> str:
    """A demangled name without return type, parameters and this library's namespaces."""
    name = re.sub(r"qlora::(cuda::)?(\(anonymous namespace\)::)?", "", name)
    depth = 0
    for end, character in enumerate(name):
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "(" and depth == 0:
            name = name[:end]
            break
    return name.removeprefix("void ")


COLUMNS = ("Kernel", "arch", "threads", "registers", "blocks/SM", "shared", "stack", "local")
COLUMNS += ("HMMA", "LDSM", "LDGSTS", "load", "store", "instructions")


def markdown(kernels: list[Kernel]) -> str:
    """A table, a row a kernel and architecture."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for kernel in kernels:
        cells = (
            *(f"`{kernel.name}`", kernel.architecture, kernel.threads or "any"),
            *(kernel.registers, kernel.thread_blocks or "", kernel.shared_bytes),
            *(kernel.stack_bytes, kernel.local_accesses),
            *(kernel.count(rf"{opcode}(\..*)?") for opcode in ("HMMA", "LDSM", "LDGSTS")),
            *(kernel.widest("LDG"), kernel.widest("STG"), kernel.opcodes.total()),
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines.append("")
    lines.append(
        "blocks/SM: thread blocks that a multiprocessor's registers are enough for. local: loads "
        "and stores of local memory. load, store: bytes of a thread's widest one in global memory."
    )
    return "\n".join(lines)


def find_tool(name: str) -> Path:
    """cuobjdump or nvdisasm: of its Python package, else of a toolkit."""
    try:
        files = importlib.metadata.files(f"nvidia-cuda-{name}") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == name:
            return Path(str(file.locate()))
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
    found = shutil.which(name) or shutil.which(name, path=str(toolkit))
    if found is None:
        raise ToolMissing(f"{name} is missing: pip install nvidia-cuda-{name}, or a CUDA toolkit")
    return Path(found)


def _cuobjdump(what: str, path: Path) -> Iterator[str]:
    """The lines that it prints, which can be a hundred megabytes: one by one."""
    folders = [str(find_tool(name).parent) for name in ("cuobjdump", "nvdisasm")]
    environment = os.environ | {"PATH": os.pathsep.join([*folders, os.environ.get("PATH", "")])}
    command = [str(find_tool("cuobjdump")), what, str(path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        last = ""
        for last in process.stdout:
            yield last
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed: {last.strip()}")


def _access_bytes(opcode: str) -> int:
    """What LDG or STG with these modifiers moves: a word unless it says otherwise."""
    sizes = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
    return next((sizes[part] for part in opcode.split(".") if part in sizes), 4)


def _number(architecture: str) -> int:
    return int(re.sub(r"\D", "", architecture))


def main() -> int:
    """0, or 77 where a tool is missing."""
    if len(sys.argv) > 1:
        path = Path(sys.argv[1])
    else:
        from qlora_native import _core

        path = Path(_core.__file__)
    try:
        print(markdown(read_kernels(path)))
    except ToolMissing as error:
        print(error, file=sys.stderr)
        return SKIPPED
    return 0


if __name__ == "__main__":
    sys.exit(main())
