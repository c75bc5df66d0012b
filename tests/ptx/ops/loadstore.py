"""``ld`` and ``st`` in all state spaces, with vectors and memory orders."""

from __future__ import annotations

import numpy as np

from tests.ptx.machine import SWITCH, Active, Function, Program
from tests.ptx.numeric import DTYPES, UNSIGNED, Array, size_of
from tests.ptx.ops import op, unknown
from tests.ptx.ops.addresses import address_reader, load, space_of, store, sync_key
from tests.ptx.ops.operands import reader, writer
from tests.ptx.parser import Instruction, Operand, Vec

ORDERS = frozenset(("relaxed", "acquire", "release", "volatile", "mmio"))
# Scopes, caching and the weak order: nothing that changes a value.
IGNORED = frozenset((
    "weak", "cta", "cluster", "gpu", "sys", "nc", "ca", "cg", "cs", "lu", "cv", "wb", "wt",
    "unified", "global", "shared", "param", "const", "local", "v2", "v4", "v8",
))  # fmt: skip


class Form:
    """What the modifiers of a load or store say."""

    def __init__(self, i: Instruction, value: Operand):
        self.kind = i.mods[-1]
        for mod in i.mods[:-1]:
            cache = mod.startswith(("L1::", "L2::")) or mod in ("shared::cta", "shared::cluster")
            if mod not in IGNORED | ORDERS and not cache:
                raise unknown(i, f"({mod})")
        if self.kind not in DTYPES or self.kind in ("pred", "tf32"):
            raise unknown(i)
        self.space = space_of(i)
        self.items = value.items if isinstance(value, Vec) else (value,)
        count = next((int(m[1:]) for m in i.mods if m in ("v2", "v4", "v8")), 1)
        if len(self.items) != count:
            raise unknown(i, f"with {len(self.items)} registers")
        self.unit = size_of(self.kind)
        self.order = next((m for m in i.mods if m in ORDERS), "")
        self.strong = bool(self.order)
        # A scope of one CTA orders nothing for other CTAs.
        self.wide = not i.has("cta")


def synchronise(
    form_space: str, active: Active, addresses: Array, *, reads: bool, writes: bool,
    acquire: bool, release: bool,
) -> None:  # fmt: skip
    """Tell the clocks of strong accesses, lane by lane."""
    cta = active.cta
    for warp, address in zip(active.lane_warps.tolist(), addresses.tolist(), strict=True):
        cta.grid.releases.access(
            cta.clocks, warp, sync_key(form_space, active, address),
            reads=reads, writes=writes, acquire=acquire, release=release,
        )  # fmt: skip


@op("ld", "ldu")
def load_instruction(i: Instruction, program: Program) -> Function:
    """``ld``: each active thread reads one value or a vector."""
    form = Form(i, i.operands[0])
    where = address_reader(i.operands[1], program)
    puts = [writer(item, form.kind, program) for item in form.items]
    raw = UNSIGNED[form.unit]
    acquire = form.order == "acquire" and form.wide

    def run(active: Active) -> str | None:
        lanes = active.lanes
        addresses = where(active)[lanes]
        values = load(form.space, i, active, addresses, form.unit, len(puts), form.strong)
        for n, put in enumerate(puts):
            if active.full:
                column = np.ascontiguousarray(values[:, n])
            else:
                column = np.zeros(active.cta.threads, raw)
                column[lanes] = values[:, n]
            put(active, column)
        if form.strong and form.space != "param":
            synchronise(form.space, active, addresses, reads=True, writes=False,
                        acquire=acquire, release=False)  # fmt: skip
        return None

    return run


@op("st")
def store_instruction(i: Instruction, program: Program) -> Function:
    """``st``: each active thread writes one value or a vector."""
    form = Form(i, i.operands[1])
    where = address_reader(i.operands[0], program)
    kind = f"b{8 * form.unit}"
    gets = [reader(item, kind if _plain(item) else form.kind, program) for item in form.items]
    raw = UNSIGNED[form.unit]
    release = form.order == "release" and form.wide

    def run(active: Active) -> str | None:
        lanes = active.lanes
        addresses = where(active)[lanes]
        values = np.stack([get(active)[lanes].view(raw) for get in gets], 1)
        store(form.space, i, active, addresses, values, form.strong)
        if form.strong:
            synchronise(form.space, active, addresses, reads=False, writes=True,
                        acquire=False, release=release)  # fmt: skip
            return SWITCH
        return None

    return run


def _plain(item: Operand) -> bool:
    from tests.ptx.parser import Reg

    return isinstance(item, Reg)
