"""Executes CUDA C text on the CPU, so that kernels are tested where there is no GPU.

`emulate(cuda_text, kernel_name)` translates the text that TVM generates (its inline PTX becomes calls of C++
functions), builds it with g++ together with `cuda_emulator_prelude.h` and returns a callable. How threads run
and which faults show is described at the head of that file. Needs g++ and an x86-64 CPU with f16c.

Not supported: asm text built by macros, shared arrays outside of kernels, thread block clusters, tensor maps
(TMA), wgmma, sparse mma, 8-bit types, waiting for another block.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

_PRELUDE = Path(__file__).with_name("cuda_emulator_prelude.h")
_GUARD_BYTES = 1 << 16  # poison around each tensor
_LAUNCH_LOCK = threading.Lock()  # a library keeps its state in global variables


def is_available() -> bool:
    """Whether this machine can build and run emulated kernels."""
    return platform.machine() in ("x86_64", "AMD64") and shutil.which("g++") is not None


# --- PTX ----------------------------------------------------------------------------------------------------

_SHARED = r"(?:\.shared(?:::cta)?)"
_ACCESS_HINTS = r"(?:\.nc|\.L[12]::(?!cache_hint)\w+)*"
_VECTOR_TYPE = r"(?:\.v[248])?\.[busf](8|16|32|64)"
_SCOPE = r"(?:\.(?:acquire|release|relaxed))?(?:\.(?:cta|cluster))?"

# PTX opcode -> function in namespace emulator. In its argument list the addresses come first, then all other
# operands in their order.
_INSTRUCTIONS: Sequence[tuple[str, str]] = (
    (r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.f16\.f16\.f32", "mma_f32<emulator::F16>"),
    (r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.bf16\.bf16\.f32", "mma_f32<emulator::BF16>"),
    (r"mma\.sync\.aligned\.m16n8k8\.row\.col\.f32\.tf32\.tf32\.f32", "mma_f32<emulator::TF32>"),
    (r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f16\.f16\.f16\.f16", "mma_f16<emulator::F16>"),
    (rf"(ld|st)matrix\.sync\.aligned\.m8n8\.x[124]{_SHARED}\.b16", r"\1matrix<false>"),
    (rf"(ld|st)matrix\.sync\.aligned\.m8n8\.x[124]\.trans{_SHARED}\.b16", r"\1matrix<true>"),
    (rf"cp\.async\.c[ag]{_SHARED}\.global{_ACCESS_HINTS}", "cp_async"),
    (r"cp\.async\.(commit_group|wait_group|wait_all)", r"cp_async_\1"),
    (rf"cp\.async\.mbarrier\.arrive{_SHARED}\.b64", "cp_async_mbarrier_arrive"),
    (rf"cp\.async\.mbarrier\.arrive\.noinc{_SHARED}\.b64", "cp_async_mbarrier_arrive_noinc"),
    (r"cp\.async\.bulk\.shared::\w+\.global\.mbarrier::complete_tx::bytes", "cp_async_bulk"),
    (rf"ld(?:\.volatile)?\.global{_ACCESS_HINTS}{_VECTOR_TYPE}", r"load<emulator::GlobalSpace, \1 / 8>"),
    (rf"st(?:\.volatile)?\.global{_ACCESS_HINTS}{_VECTOR_TYPE}", r"store<emulator::GlobalSpace, \1 / 8>"),
    (rf"ld(?:\.volatile)?{_SHARED}{_VECTOR_TYPE}", r"load<emulator::SharedSpace, \1 / 8>"),
    (rf"st(?:\.volatile)?{_SHARED}{_VECTOR_TYPE}", r"store<emulator::SharedSpace, \1 / 8>"),
    (r"(?:bar|barrier)(?:\.cta)?\.(sync|arrive)(?:\.aligned)?", r"bar_\1"),
    (r"shfl\.sync\.up\.b32", "shfl_sync<emulator::Shuffle::up>"),
    (r"shfl\.sync\.down\.b32", "shfl_sync<emulator::Shuffle::down>"),
    (r"shfl\.sync\.bfly\.b32", "shfl_sync<emulator::Shuffle::butterfly>"),
    (r"shfl\.sync\.idx\.b32", "shfl_sync<emulator::Shuffle::indexed>"),
    (r"elect\.sync", "elect_sync"),
    (rf"mbarrier\.init{_SHARED}?\.b64", "mbarrier_init"),
    (rf"mbarrier\.(arrive|arrive\.expect_tx|expect_tx|complete_tx){_SCOPE}{_SHARED}?\.b64", r"mbarrier_\1"),
    (rf"mbarrier\.try_wait(?:\.parity)?{_SCOPE}{_SHARED}?\.b64", "mbarrier_try_wait"),
    (r"cvt\.rna\.tf32\.f32", "cvt_rna_tf32"),
    (r"cvt\.rn\.f16x2\.f32", "cvt_pack<half>"),
    (r"cvt\.rn\.bf16x2\.f32", "cvt_pack<nv_bfloat16>"),
    (r"(add|sub|mul|fma)(?:\.rn)?\.f16x2", r"\1_f16x2"),
    (r"fma\.rn\.bf16x2", "fma_bf16x2"),
    (r"(max|min)\.f16x2", r"\1_f16x2"),
    (r"(max|min)\.NaN\.f16x2", r"\1_nan_x2<half2>"),
    (r"(max|min)\.NaN\.bf16x2", r"\1_nan_x2<nv_bfloat162>"),
    (r"mov\.[bsuf](?:32|64)", "mov"),
    (r"selp\.[bsuf](?:32|64)", "selp"),
    (r"setp\.(eq|ne)\.[bsu](?:32|64)", r"setp_\1"),
    (r"(?:setmaxnreg|griddepcontrol|fence|membar|mbarrier\.inval)\..*", "no_operation"),
)

_REGISTER_TYPES = {"pred": "bool", "b32": "uint32_t", "u32": "uint32_t", "s32": "int32_t", "b64": "uint64_t"}
_STRING = r'"((?:[^"\\]|\\.)*)"'
_ASM = re.compile(r"\b(?:asm|__asm__)\s*(?:volatile|__volatile__)?\s*\(")


def _split(text: str, separator: str) -> list[str]:
    """Splits at the separators outside of brackets and string literals; drops blank parts at the end."""
    parts, depth, start = [], 0, 0
    for token in re.finditer(rf"{_STRING}|[()\[\]{{}}]|{re.escape(separator)}", text):
        if token[0] in "([{":
            depth += 1
        elif token[0] in ")]}":
            depth -= 1
        elif token[0] == separator and depth == 0:
            parts.append(text[start : token.start()].strip())
            start = token.end()
    parts.append(text[start:].strip())
    while parts and not parts[-1]:
        parts.pop()
    return parts


def _find_closing(text: str, start: int) -> int:
    """The position of the bracket that closes the one just before `start`."""
    depth = 1
    for token in re.compile(rf"{_STRING}|[()\[\]{{}}]").finditer(text, start):
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(token[0], 0)
        if depth == 0:
            return token.start()
    raise ValueError("unbalanced brackets in the CUDA text")


class _AsmTranslator:
    """Translates one asm statement. PTX registers and labels become C++ ones with a unique prefix."""

    def __init__(self, arguments: str, index: int) -> None:
        sections = _split(arguments, ":")
        self._prefix = f"ptx{index}_"
        template = "".join(re.findall(_STRING, sections[0])).replace("\\n", "\n").replace("\\t", " ")
        self._template = re.sub(r"//[^\n]*", "", template)
        self._operands: list[str] = []
        self._written_only: set[int] = set()
        self._declarations: dict[str, str] = {}
        for operand in (operand for section in sections[1:3] for operand in _split(section, ",")):
            expression = re.fullmatch(rf"{_STRING}\s*(\(.*\))", operand, re.DOTALL)
            if expression is None:
                raise NotImplementedError(f"asm operand: {operand}")
            if expression[1].startswith("="):
                self._written_only.add(len(self._operands))
            self._operands.append(expression[2])

    def translate(self) -> str:
        """The C++ statement, without its final semicolon."""
        statements = [self._statement(statement) for statement in self._template.split(";")]
        declarations = [f"{kind} {name} = 0;" for name, kind in self._declarations.items()]
        return "do { " + " ".join([*declarations, *filter(None, statements)]) + " } while (0)"

    def _statement(self, text: str) -> str:
        text = text.strip().lstrip("{}").strip()
        if label := re.match(r"(\w+)\s*:(?!:)", text):
            return f"{self._prefix}{label[1]}: {self._statement(text[label.end() :]) or ';'}"
        if guard := re.match(r"@(!?)%*(\w+)\s+", text):
            guarded = text[guard.end() :]
            # The compiler may drop an earlier value of an operand that the asm only writes ("=r", not "+r").
            numbers = [int(number) for number in re.findall(r"%(\d+)", guarded)]
            lost = [self._operands[n] for n in dict.fromkeys(numbers) if n in self._written_only]
            otherwise = " ".join(f"emulator::poison{operand};" for operand in lost)
            condition = f"{guard[1]}{self._name(guard[2])}"
            return f"if ({condition}) {{ {self._statement(guarded)} }} else {{ {otherwise} }}"
        if branch := re.fullmatch(r"bra(?:\.uni)?\s+(\w+)", text):
            return f"goto {self._prefix}{branch[1]};"
        if register := re.fullmatch(r"\.reg\s*\.(\w+)\s+(.*)", text):
            if register[1] not in _REGISTER_TYPES:
                raise NotImplementedError(f"asm: {text}")
            for name in _split(register[2], ","):
                self._declarations[self._prefix + name.lstrip("%")] = _REGISTER_TYPES[register[1]]
            return ""
        return self._instruction(text) if text else ""

    def _instruction(self, text: str) -> str:
        instruction = re.fullmatch(r"([\w.:]+)(.*)", text, re.DOTALL)
        for pattern, function in _INSTRUCTIONS:
            if instruction is not None and (opcode := re.fullmatch(pattern, instruction[1])):
                addresses: list[str] = []
                others: list[str] = []
                for operand in _split(instruction[2].strip(), ","):
                    self._operand(operand, addresses, others)
                function = opcode.expand(function).replace(".", "_")
                return f"emulator::{function}({', '.join(addresses + others)});"
        raise NotImplementedError(f"asm: {text}")

    def _operand(self, text: str, addresses: list[str], others: list[str]) -> None:
        """Appends the C++ expressions of a PTX operand: `%0`, `5`, `p`, `_`, `d|p`, `{a, b}`, `[%0 + 4]`."""
        if text.startswith("{"):
            others += [self._expression(element) for element in _split(text[1:-1], ",")]
        elif text.startswith("["):
            addresses.append(self._expression(text[1:-1], "emulator::byte_address"))
        else:
            others += [self._expression(part) for part in text.split("|")]

    def _expression(self, text: str, conversion: str = "") -> str:
        def replace(token: re.Match[str]) -> str:
            return conversion + self._operands[int(token[1])] if token[1] else self._name(token[2])

        return re.sub(r"%(\d+)|%*\b([A-Za-z_]\w*)", replace, text.strip())

    def _name(self, name: str) -> str:
        if name == "_":
            return "emulator::sink"
        if self._prefix + name not in self._declarations:
            raise NotImplementedError(f"asm register: {name}")
        return self._prefix + name


def _translate_asm(text: str) -> str:
    parts, end = [], 0
    for index, statement in enumerate(_ASM.finditer(text)):
        closing = _find_closing(text, statement.end())
        parts += [
            text[end : statement.start()],
            _AsmTranslator(text[statement.end() : closing], index).translate(),
        ]
        end = closing + 1
    return "".join([*parts, text[end:]])


# --- kernels ------------------------------------------------------------------------------------------------

_SCALARS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("char", "signed char", "int8_t"), ctypes.c_int8),
    **dict.fromkeys(("uchar", "unsigned char", "uint8_t"), ctypes.c_uint8),
    **dict.fromkeys(("short", "int16_t"), ctypes.c_int16),
    **dict.fromkeys(("ushort", "unsigned short", "uint16_t"), ctypes.c_uint16),
    **dict.fromkeys(("int", "int32_t"), ctypes.c_int32),
    **dict.fromkeys(("uint", "unsigned", "unsigned int", "uint32_t"), ctypes.c_uint32),
    **dict.fromkeys(("long", "long long", "int64_t"), ctypes.c_int64),
    **dict.fromkeys(("unsigned long", "unsigned long long", "uint64_t", "size_t"), ctypes.c_uint64),
    "bool": ctypes.c_bool,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
}


class _Kernel(NamedTuple):
    name: str
    parameters: tuple[tuple[str, str], ...]  # C type, name
    uses_dynamic_shared: bool


def _parse_parameter(text: str) -> tuple[str, str]:
    text = re.sub(r"\b(?:__restrict__|__grid_constant__|const)\b", " ", text)
    declaration = re.fullmatch(r"\s*(.*?)\s*(\w+)\s*", text, re.DOTALL)
    kind = re.sub(r"\s+", " ", declaration[1]) if declaration else ""
    if declaration is None or not (kind in _SCALARS or kind.endswith("*")):
        raise NotImplementedError(f"kernel parameter: {text.strip()}")
    return kind, declaration[2]


_ALIGNMENT = r"(?:(?:alignas|__align__)\(\d+\)\s+)?"
_KERNEL = re.compile(
    r'extern\s+"C"\s+__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\s*\(([^)]*)\)\s*\{'
)
_STATIC_ARRAY = re.compile(
    rf"(?:static\s+)?__shared__\s+({_ALIGNMENT}[\w ]+?)\s+(\w+)\s*((?:\[[^]]+\]\s*)*);"
)
_DYNAMIC_ARRAY = re.compile(rf"extern\s+__shared__\s+{_ALIGNMENT}([\w ]+?)\s+(\w+)\s*\[\s*\];")


def _translate_kernels(text: str) -> tuple[str, list[_Kernel]]:
    """Moves the shared arrays of each kernel into the arena and adds functions that launch the kernels."""
    parts, kernels, end = [], [], 0
    for match in _KERNEL.finditer(text):
        name = match[1]
        kernel = _Kernel(
            name, tuple(_parse_parameter(parameter) for parameter in _split(match[2], ",")), False
        )
        closing = _find_closing(text, match.end())
        body = text[match.end() : closing]
        body, dynamic = _DYNAMIC_ARRAY.subn(r"\1* \2 = (\1*)emulator::dynamic_shared();", body)
        members = " ".join(f"{array[1]} {array[2]}{array[3]};" for array in _STATIC_ARRAY.finditer(body))
        body = _STATIC_ARRAY.sub(rf"auto& \2 = ((emulator_shared_{name}*)emulator::arena)->\2;", body)
        values = ", ".join(f"*({kind}*)arguments[{i}]" for i, (kind, _) in enumerate(kernel.parameters))
        shared_bytes = f"sizeof(emulator_shared_{name})" if members else "0"
        parts += [
            text[end : match.start()],
            f"struct emulator_shared_{name} {{ {members} }};\n{match[0]}{body}}}\n",
            f"static void emulator_body_{name}(void** arguments) {{ {name}({values}); }}\n",
            f'extern "C" const char* emulator_launch_{name}(void** arguments, const int* shape) {{\n',
            f"  return emulator::launch(emulator_body_{name}, arguments, shape, {shared_bytes});\n}}\n",
        ]
        kernels.append(kernel._replace(uses_dynamic_shared=dynamic > 0))
        end = closing + 1
    translated = "".join([*parts, text[end:]])
    if unknown := re.search(r".*\b__shared__\b.*", translated):
        raise NotImplementedError(f"declaration of shared memory: {unknown[0].strip()}")
    return translated, kernels


# --- building -----------------------------------------------------------------------------------------------


@functools.cache
def _compiler_flags() -> tuple[str, ...]:
    # -nodefaultlibs leaves out libubsan: the prelude has the one function that the sanitizer needs.
    flags = (
        "-std=c++17 -O1 -mf16c -mfma -ffp-contract=off -fno-strict-aliasing -w -fPIC -shared -nodefaultlibs "
        "-fsanitize=alignment -fno-sanitize-recover=alignment"
    )
    version = subprocess.run(["g++", "-dumpversion"], capture_output=True, text=True, check=True).stdout
    if int(version.split(".")[0]) >= 12:
        flags += (
            " -ftrivial-auto-var-init=pattern"  # shows variables that a kernel reads before it writes them
        )
    return tuple(flags.split())


@functools.cache
def _load_library(source: str) -> ctypes.CDLL:
    """Builds the source, or takes what an earlier process has built."""
    flags = _compiler_flags()
    key = hashlib.sha256("\0".join((source, _PRELUDE.read_text(), *flags)).encode()).hexdigest()[:24]
    cache = Path(tempfile.gettempdir()) / f"cuda_emulator_{os.getuid()}"
    cache.mkdir(mode=0o700, exist_ok=True)
    library = cache / f"{key}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=cache) as directory:
            built, code = Path(directory) / "kernel.so", Path(directory) / "kernel.cpp"
            code.write_text(source)
            files = ["-I", str(_PRELUDE.parent), str(code), "-o", str(built)]
            command = ["g++", *flags, *files, "-lstdc++", "-lm", "-lgcc_s", "-lgcc", "-lc"]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode:
                raise RuntimeError(f"g++ cannot build the translated kernel:\n{result.stderr[-4000:]}")
            os.replace(built, library)
    return ctypes.CDLL(str(library))


# --- running ------------------------------------------------------------------------------------------------


class _GuardedStorage:
    """A copy of a tensor's storage between poisoned areas, which show reads and writes beyond the tensor."""

    def __init__(self, tensor: torch.Tensor, name: str) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
        self._name = name
        self._memory = torch.full((self._bytes.numel() + 2 * _GUARD_BYTES,), 0xFF, dtype=torch.uint8)
        self._inside = self._memory[_GUARD_BYTES : _GUARD_BYTES + self._bytes.numel()]
        self._inside.copy_(self._bytes)

    def address_of(self, tensor: torch.Tensor) -> int:
        return self._inside.data_ptr() + tensor.storage_offset() * tensor.element_size()

    def finish(self) -> None:
        self._bytes.copy_(self._inside)
        around = torch.cat((self._memory[:_GUARD_BYTES], self._memory[_GUARD_BYTES + self._bytes.numel() :]))
        if bool((around != 0xFF).any()):
            raise RuntimeError(f"the kernel wrote outside of {self._name}")


class EmulatedKernel:
    """A kernel of a CUDA text, callable with CPU tensors and numbers in the order of `args`."""

    def __init__(self, cuda_text: str, kernel_name: str, *, order: str = "forward") -> None:
        if order not in ("forward", "reverse"):
            raise ValueError(f"order is 'forward' or 'reverse', not {order!r}")
        text = re.sub(rf"({_STRING})|//[^\n]*|/\*.*?\*/", r"\1", cuda_text, flags=re.DOTALL)
        text = re.sub(r"^[ \t]*#[ \t]*include\b.*$", "", text, flags=re.MULTILINE)
        text, kernels = _translate_kernels(_translate_asm(text))
        by_name = {kernel.name: kernel for kernel in kernels}
        if kernel_name not in by_name:
            raise ValueError(f"no kernel {kernel_name!r} in the text, only {sorted(by_name)}")
        self._kernel = by_name[kernel_name]
        self._reverse = order == "reverse"
        self.args = tuple(name for _, name in self._kernel.parameters)
        library = _load_library(f'#include "{_PRELUDE.name}"\n{text}')
        self._launch = library[f"emulator_launch_{kernel_name}"]
        self._launch.restype = ctypes.c_char_p

    def __call__(
        self,
        *values: torch.Tensor | float,
        grid: Sequence[int],
        block: Sequence[int],
        dynamic_shared_bytes: int | None = None,
    ) -> None:
        """Runs the kernel; tensors are changed in place.

        Without `dynamic_shared_bytes` a kernel with dynamic shared memory may use all 227 KiB. Raises
        RuntimeError for deadlocks, diverged warps, misaligned accesses, bad shared addresses and writes out
        of bounds.
        """
        if len(values) != len(self.args):
            raise TypeError(f"{self._kernel.name} takes {self.args}, got {len(values)} values")
        storages: dict[int, _GuardedStorage] = {}
        arguments = [
            self._convert(kind, name, value, storages)
            for (kind, name), value in zip(self._kernel.parameters, values, strict=True)
        ]
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        if not self._kernel.uses_dynamic_shared:
            dynamic_shared_bytes = 0
        elif dynamic_shared_bytes is None:
            dynamic_shared_bytes = -1
        sizes = [*grid, *[1] * (3 - len(grid)), *block, *[1] * (3 - len(block))]
        configuration = (ctypes.c_int * 8)(*sizes, dynamic_shared_bytes, self._reverse)
        with _LAUNCH_LOCK:
            message = self._launch(pointers, configuration)
        if message is not None:
            raise RuntimeError(f"{self._kernel.name}: {message.decode()}")
        for storage in storages.values():
            storage.finish()

    @staticmethod
    def _convert(
        kind: str, name: str, value: torch.Tensor | float, storages: dict[int, _GuardedStorage]
    ) -> Any:
        """The value as the C type that the kernel declares."""
        if not isinstance(value, torch.Tensor):
            if kind not in _SCALARS:
                raise TypeError(f"{name} is a {kind}: pass a tensor")
            argument = _SCALARS[kind](value)
            if isinstance(argument.value, int) and argument.value != value:
                raise OverflowError(f"{name}: {value} does not fit {kind}")
            return argument
        if kind in _SCALARS or value.device.type != "cpu":
            raise TypeError(f"{name} is a {kind}: got a tensor on {value.device}")
        key = value.untyped_storage().data_ptr()
        if key not in storages:
            storages[key] = _GuardedStorage(value, name)
        return ctypes.c_void_p(storages[key].address_of(value))


def emulate(cuda_text: str, kernel_name: str, *, order: str = "forward") -> EmulatedKernel:
    """Makes the kernel `kernel_name` of a CUDA text callable.

    `order` is the order in which threads and blocks run, "forward" or "reverse": as a rule a missing barrier
    gives wrong results in at least one of them.
    """
    return EmulatedKernel(cuda_text, kernel_name, order=order)
