"""PTX text to a list of instructions with resolved operands and branch targets."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from tests.ptx.errors import ParseError
from tests.ptx.numeric import size_of


@dataclass(frozen=True)
class Reg:
    """A register: its place in the CTA's register file and its declared type."""

    index: int
    kind: str
    name: str


@dataclass(frozen=True)
class Imm:
    """A literal: an integer, a float, or the bits of a ``0f``/``0d`` constant."""

    value: int | float
    bits: int = 0  # width of a 0f/0d literal, whose value then is its bit pattern


@dataclass(frozen=True)
class Sym:
    """The address of a variable or parameter."""

    name: str


@dataclass(frozen=True)
class Special:
    """A read-only register such as ``%tid.x``."""

    name: str


@dataclass(frozen=True)
class Not:
    """A negated predicate operand."""

    operand: Operand


@dataclass(frozen=True)
class Sink:
    """``_``: a result nobody wants."""


@dataclass(frozen=True)
class Vec:
    """``{a, b, ...}``."""

    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Pair:
    """``d|p``: two results."""

    first: Operand
    second: Operand


@dataclass(frozen=True)
class Mem:
    """``[base + offset]``, or ``[base, {coordinates}]`` of a tensor copy."""

    base: Operand | None
    offset: int
    coordinates: Operand | None = None


Operand = Reg | Imm | Sym | Special | Not | Sink | Vec | Pair | Mem


@dataclass
class Instruction:
    """One statement of a kernel's body."""

    line: int
    text: str
    name: str  # the first part of the opcode
    mods: tuple[str, ...]  # the rest
    operands: tuple[Operand, ...]
    guard: Reg | None = None
    guard_negated: bool = False
    target: int = -1  # of a branch
    is_label: bool = False  # some branch comes here

    @property
    def opcode(self) -> str:
        return ".".join((self.name, *self.mods))

    def has(self, mod: str) -> bool:
        return mod in self.mods

    @property
    def types(self) -> list[str]:
        """The type modifiers, in order."""
        return [m for m in self.mods if m in TYPES]


TYPES = frozenset(
    [
        "pred",
        "b8",
        "u8",
        "s8",
        "b16",
        "u16",
        "s16",
        "f16",
        "bf16",
        "b32",
        "u32",
        "s32",
        "f32",
        "b64",
        "u64",
        "s64",
        "f64",
        "b128",
        "f16x2",
        "bf16x2",
        "tf32",
    ]
)


MATRIX = frozenset(("mma", "wgmma"))


@dataclass
class Param:
    """A kernel parameter: a scalar of ``kind``, or ``size`` raw bytes (``kind`` b8)."""

    name: str
    kind: str
    size: int
    offset: int
    pointer: bool


@dataclass
class Variable:
    """A variable of a state space; ``size`` None for the dynamic shared memory."""

    name: str
    align: int
    size: int | None
    data: bytes = b""


@dataclass
class Kernel:
    """An entry point."""

    name: str
    params: list[Param]
    param_bytes: int
    reqntid: tuple[int, int, int] | None
    maxntid: tuple[int, int, int] | None
    instructions: list[Instruction]
    registers: list[Reg]
    shared: list[Variable]
    local: list[Variable]
    module: Module

    @property
    def shared_bytes(self) -> int:
        """Static shared memory."""
        end = 0
        for v in self.shared:
            end = -(-end // v.align) * v.align + (v.size or 0)
        return end

    def main_loops(self) -> list[set[int]]:
        """The PTX lines of each innermost loop that holds a matrix instruction."""
        code = self.instructions
        loops = [
            range(i.target, n + 1)
            for n, i in enumerate(code)
            if i.name == "bra"
            and i.target <= n
            and any(c.name in MATRIX for c in code[i.target : n + 1])
        ]
        inner = [a for a in loops if not any(b != a and set(b) < set(a) for b in loops)]
        return [{code[n].line for n in loop} for loop in inner]

    def main_loop_lines(self) -> set[int]:
        """The lines of all :meth:`main_loops`."""
        return set().union(*self.main_loops())


class Module:
    """A parsed PTX file."""

    def __init__(self, text: str):
        self.text = text
        clean = _strip_comments(text)
        target = re.search(r"^\s*\.target\s+(\w+)", clean, re.M)
        self.target = target.group(1) if target else ""
        self.kernels: dict[str, Kernel] = {}
        self.shared: list[Variable] = []
        self.globals: list[Variable] = []
        outside = clean
        for match in re.finditer(r"\.(entry|func)\b[^{;]*?([\w$]+)\s*\(", clean):
            end = self._definition(clean, match)
            hole = re.sub(r"[^\n]", " ", clean[match.start() : end])
            outside = outside[: match.start()] + hole + outside[end:]
        for space, variable in _variables(outside):
            (self.shared if space == "shared" else self.globals).append(variable)
        for kernel in self.kernels.values():
            names = re.compile(r"[\w$%]+").findall(" ".join(i.text for i in kernel.instructions))
            kernel.shared += [v for v in self.shared if v.name in set(names)]

    def _definition(self, text: str, match: re.Match[str]) -> int:
        """Parse an entry; the end of the entry's or function's text."""
        close = text.index(")", match.end())
        stop = re.compile(r"[{;]").search(text, close)
        if stop is None or stop.group() == ";":  # a declaration
            return close + 1
        end = _matching(text, stop.start())
        if match.group(1) == "entry":
            body = _Body(text[: end - 1], stop.start() + 1)
            params, total = _params(text[match.end() : close])
            head = text[close : stop.start()]
            self.kernels[match.group(2)] = Kernel(
                match.group(2), params, total, _dims("reqntid", head), _dims("maxntid", head),
                body.instructions, body.registers, body.shared, body.local, self,
            )  # fmt: skip
        return end


def _strip_comments(text: str) -> str:
    text = re.sub(r"/\*.*?\*/", lambda m: re.sub(r"[^\n]", " ", m.group()), text, flags=re.S)
    return re.sub(r"//[^\n]*", "", text)


def _matching(text: str, start: int) -> int:
    depth = 0
    for match in re.compile(r'"[^"]*"|[{}]').finditer(text, start):
        if match.group() in "{}":
            depth += 1 if match.group() == "{" else -1
            if depth == 0:
                return match.end()
    raise ParseError("unbalanced braces")


def _dims(name: str, head: str) -> tuple[int, int, int] | None:
    match = re.search(rf"\.{name}\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", head)
    if match is None:
        return None
    x, y, z = (int(g or 1) for g in match.groups())
    return x, y, z


def _params(text: str) -> tuple[list[Param], int]:
    params, offset = [], 0
    pattern = re.compile(
        r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)((?:\s+\.(?:ptr|global|const|align\s+\d+))*)"
        r"\s+([\w$]+)\s*(?:\[(\d+)\])?"
    )
    for align, kind, pointer, name, count in pattern.findall(text):
        unit = size_of(kind)
        size = unit * int(count or 1)
        step = int(align or unit)
        offset = -(-offset // step) * step
        params.append(Param(name, kind, size, offset, ".ptr" in pointer))
        offset += size
    return params, offset


_VARIABLE = re.compile(
    r"\.(shared|global|const|local)\s+(?:\.attribute\([^)]*\)\s*)?(?:\.align\s+(\d+)\s+)?"
    r"\.(\w+)\s+([\w$]+)\s*((?:\[\d*\])*)\s*(?:=\s*(\{[^}]*\}|[^;]+))?;"
)


def _variables(text: str) -> list[tuple[str, Variable]]:
    found = []
    for space, align, kind, name, dims, value in _VARIABLE.findall(text):
        unit = size_of(kind)
        counts = re.findall(r"\[(\d*)\]", dims)
        size: int | None = unit
        for count in counts:
            size = None if count == "" or size is None else size * int(count)
        data = b""
        if value:
            words = re.findall(r"[\w.+-]+", value)
            mask = (1 << 8 * unit) - 1
            data = b"".join((int(_number(w).value) & mask).to_bytes(unit, "little") for w in words)
        found.append((space, Variable(name, int(align or unit), size, data)))
    return found


def _number(word: str) -> Imm:
    sign = -1 if word.startswith("-") else 1
    body = word.lstrip("+-")
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", body):
        return Imm(int(body[2:], 16) ^ (1 << 31 if sign < 0 else 0), 32)
    if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", body):
        return Imm(int(body[2:], 16) ^ (1 << 63 if sign < 0 else 0), 64)
    if re.fullmatch(r"0[xX][0-9a-fA-F]+U?", body):
        return Imm(sign * int(body.rstrip("U"), 16))
    if re.fullmatch(r"0[0-7]+U?", body):
        return Imm(sign * int(body.rstrip("U"), 8))
    if re.fullmatch(r"\d+U?", body):
        return Imm(sign * int(body.rstrip("U")))
    return Imm(sign * float(body))


@dataclass
class _Scope:
    key: int
    registers: dict[str, Reg] = field(default_factory=dict)
    families: dict[str, str] = field(default_factory=dict)  # prefix of %r<9> to its type


class _Body:
    """Scans a kernel's body; registers and labels obey the nesting of braces."""

    _statement = re.compile(
        r"\s*([\w$%]+\s*:(?!:)|[{}]|\.loc\b[^\n]*|[^;{}]*?(?=[;{}])[^;]*;)", re.S
    )

    def __init__(self, text: str, start: int):
        self.instructions: list[Instruction] = []
        self.registers: list[Reg] = []
        self.shared: list[Variable] = []
        self.local: list[Variable] = []
        self._scopes = [_Scope(0)]
        self._keys = 0
        self._labels: dict[tuple[int, str], int] = {}
        self._branches: list[tuple[Instruction, str, tuple[int, ...]]] = []
        self._line = 1 + text.count("\n", 0, start)
        self._scan(text, start)
        self._resolve()

    def _scan(self, text: str, at: int) -> None:
        while text[at:].strip():
            match = self._statement.match(text, at)
            if match is None:
                raise ParseError(f"cannot read {text[at : at + 60]!r}")
            statement = match.group(1)
            self._line += text.count("\n", at, match.start(1))
            if statement == "{":
                self._keys += 1
                self._scopes.append(_Scope(self._keys))
            elif statement == "}":
                self._scopes.pop()
            elif statement.endswith(":"):
                self._labels[self._scopes[-1].key, statement[:-1].strip()] = len(self.instructions)
            elif statement.startswith("."):
                self._directive(statement)
            else:
                self._instruction(statement[:-1].strip())
            self._line += statement.count("\n")
            at = match.end()

    def _directive(self, text: str) -> None:
        if text.startswith(".reg"):
            _, kind, names = re.split(r"\s+", text.rstrip(";"), maxsplit=2)
            for name in re.split(r"\s*,\s*", names.strip()):
                family = re.fullmatch(r"([\w$%]+)<\d+>", name)
                if family:
                    self._scopes[-1].families[family.group(1)] = kind[1:]
                else:
                    self._declare(name, kind[1:], self._scopes[-1])
        elif text.startswith((".shared", ".local")):
            for space, variable in _variables(text):
                (self.shared if space == "shared" else self.local).append(variable)
        elif not text.startswith((".loc", ".pragma", ".file", ".param")):
            raise ParseError(f"unknown directive {text!r}")

    def _declare(self, name: str, kind: str, scope: _Scope) -> Reg:
        reg = Reg(len(self.registers), kind, name)
        self.registers.append(reg)
        scope.registers[name] = reg
        return reg

    def _register(self, name: str) -> Reg | None:
        prefix = name.rstrip("0123456789")
        for scope in reversed(self._scopes):
            if name in scope.registers:
                return scope.registers[name]
            if prefix in scope.families and prefix != name:
                return self._declare(name, scope.families[prefix], scope)
        return None

    def _instruction(self, text: str) -> None:
        match = re.match(r"(?:@(!?)\s*([\w$%]+)\s+)?([\w.:]+)\s*(.*)", text, re.S)
        if match is None:
            raise ParseError(f"cannot read {text!r}")
        negated, guard, opcode, rest = match.groups()
        name, *mods = re.split(r"\.", opcode)
        instruction = Instruction(
            self._line, " ".join(text.split()), name, tuple(mods), (),
            self._register(guard) if guard else None, bool(negated),
        )  # fmt: skip
        if guard and instruction.guard is None:
            raise ParseError(f"unknown guard in {text!r}")
        if name == "bra":
            scopes = tuple(s.key for s in reversed(self._scopes))
            self._branches.append((instruction, rest.strip(), scopes))
        elif name not in ("brx", "call"):
            instruction.operands = tuple(self._operand(o) for o in _split(rest))
        self.instructions.append(instruction)

    def _operand(self, text: str) -> Operand:
        if text.startswith("["):
            return self._memory(text[1:-1].strip())
        if text.startswith("{"):
            return Vec(tuple(self._operand(o) for o in _split(text[1:-1])))
        if text == "_":
            return Sink()
        if text.startswith("!"):
            return Not(self._operand(text[1:].strip()))
        if "|" in text:
            first, second = text.split("|")
            return Pair(self._operand(first.strip()), self._operand(second.strip()))
        register = self._register(text)
        if register is not None:
            return register
        if re.match(r"[+-]?[\d.]", text):
            return _number(text)
        if text.startswith("%"):
            return Special(text)
        if re.fullmatch(r"[\w$]+", text):
            return Sym(text)
        raise ParseError(f"unknown operand {text!r}")

    def _memory(self, text: str) -> Mem:
        parts = _split(text)
        match = re.fullmatch(r"([\w$%]+)\s*(?:([+-])\s*([+-]?\w+))?", parts[0])
        if match is None or len(parts) > 2:
            raise ParseError(f"unknown address {text!r}")
        base, sign, shift = match.groups()
        offset = int(_number(shift).value) * (-1 if sign == "-" else 1) if shift else 0
        operand = self._operand(base)
        coordinates = self._operand(parts[1]) if len(parts) == 2 else None
        if isinstance(operand, Imm):
            return Mem(None, offset + int(operand.value), coordinates)
        return Mem(operand, offset, coordinates)

    def _resolve(self) -> None:
        end = Instruction(self._line, "ret", "ret", (), ())
        self.instructions.append(end)  # falling off the end returns
        for branch, label, scopes in self._branches:
            for key in scopes:
                if (key, label) in self._labels:
                    branch.target = self._labels[key, label]
                    self.instructions[branch.target].is_label = True
                    break
            else:
                raise ParseError(f"unknown label {label!r} at line {branch.line}")


def _split(text: str) -> list[str]:
    """At commas outside brackets and braces."""
    parts, depth, last = [], 0, 0
    for at, c in enumerate(text):
        if c in "[{(":
            depth += 1
        elif c in "]})":
            depth -= 1
        elif c == "," and depth == 0:
            parts.append(text[last:at].strip())
            last = at + 1
    rest = text[last:].strip()
    return [*parts, rest] if rest or parts else []
