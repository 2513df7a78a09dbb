"""Move logic that only registers of one clock and enable take into their ``always`` block.

A simulator evaluates a wire whenever what it depends on may have changed, in most designs in every cycle, unless one
expression alone takes it. Logic with several uses in front of registers that hold is so evaluated for nothing. Here it
becomes variables of the registers' block, evaluated when they load.

Works on the text that Yosys writes for a flat module: one assignment a line, blocks of a few lines.
"""

import collections
import re

__all__ = ["sink"]

_NAME = re.compile(r"\\\S+|[A-Za-z_][\w$]*")
_SIGNAL = r"(?:\\\S+ |[A-Za-z_][\w$]*)(?: ?\[\d+(?::\d+)?\])?"
_ASSIGN = re.compile(rf"  assign ({_SIGNAL}) ?= (.*);$")
_WIRE = re.compile(r"  wire (\[\d+:0\] )?(\\\S+|\w[\w$]*) ?;$")
_EDGE = re.compile(r"  always @\(posedge .*\)$")
_LOADS = re.compile(rf"    (if \((!?{_SIGNAL})\) )?({_SIGNAL}) ?<= (.*);$")
_RESET = re.compile(rf"    (if \({_SIGNAL}\)) ({_SIGNAL}) ?<= (.*);$")
_ELSE = re.compile(rf"    else (if \((!?{_SIGNAL})\) )?({_SIGNAL}) ?<= (.*);$")
_LOWER = re.compile(r"\S+ ?\[(\d+):0\]")
_USE = re.compile(r"(\\\S+|[A-Za-z_][\w$]*) ?(?:\[(\d+))?")
_PLAIN = re.compile(rf"~? ?{_SIGNAL} *")
_WIDTH = re.compile(r"\[(\d+)")
_WIDEST = 64  # bits of a variable that a simulator keeps in a register


def sink(text):
    """The same Verilog with logic of one group of registers in their block; every module of ``text`` for itself."""
    return re.sub(r"^module .*?^endmodule", lambda found: _Module(found[0].split("\n")).text(), text, flags=re.S | re.M)


class _Register:
    """An ``always`` block that loads one register: ``group`` is its sensitivity, reset and enable."""

    def __init__(self, lines):
        reset = _RESET.match(lines[1]) if len(lines) == 3 else None
        loads = (_ELSE if reset else _LOADS).match(lines[-1])
        self.group = (lines[0], reset and reset[1], loads and loads[2])
        self.matches = loads is not None and len(lines) == 2 + bool(reset)
        self.reset = reset and f"{reset[2]} <= {reset[3]};"
        self.target, self.value = (loads[3], loads[4]) if loads else ("", "")


class _Module:
    def __init__(self, lines):
        self.lines = lines
        self.wires = {}      # name: (line, range)
        self.assigns = []    # (line, name, target, value)
        self.registers = []  # (first line, number of lines, _Register)
        self.taken = {}      # wire: what takes it: ("assign" or "register", index), or None: something else
        self._parse()
        self.drivers = {}
        for index, (_, name, _, _) in enumerate(self.assigns):
            self.drivers.setdefault(name, []).append(index)
        self._narrow()
        self._find_uses()

    def _parse(self):
        at, other = 0, []
        while at < len(self.lines):
            line = self.lines[at]
            if found := _WIRE.match(line):
                self.wires[found[2]] = at, found[1] or ""
            elif found := _ASSIGN.match(line):
                self.assigns.append((at, _NAME.match(found[1])[0], found[1], found[2]))
            elif _EDGE.match(line):
                end = at + 1
                while end < len(self.lines) and self.lines[end].startswith("    "):
                    end += 1
                register = _Register(self.lines[at:end])
                if register.matches:
                    self.registers.append((at, end - at, register))
                    other += [text for text in register.group if text]
                else:
                    other += self.lines[at:end]
                at = end - 1
            else:
                other.append(line)
            at += 1
        self.other = other

    def _narrow(self):
        """Leave out upper bits that nothing drives or takes, which wreduce leaves: now one assignment drives all."""
        half_driven = {}
        for name, (index, *more) in self.drivers.items():
            if not more and (found := _LOWER.fullmatch(self.assigns[index][2])) and name in self.wires:
                half_driven[name] = int(found[1])
        for line in self.lines:
            if not line.startswith("  wire "):
                for name, top in _USE.findall(line):
                    if name in half_driven and (not top or int(top) > half_driven[name]):
                        del half_driven[name]
        for name, top in half_driven.items():
            at, _ = self.wires[name]
            self.wires[name] = at, f"[{top}:0] "
            self.lines[at] = f"  wire [{top}:0] {name} ;"
            index, = self.drivers[name]
            at, _, _, value = self.assigns[index]
            self.assigns[index] = at, name, f"{name} ", value
            self.lines[at] = f"  assign {name}  = {value};"

    def _find_uses(self):
        for line in self.other:  # ports and what this does not know, too
            for name in _NAME.findall(line):
                self.taken[name] = None
        for kind, values in (("assign", (value for *_, value in self.assigns)),
                             ("register", (register.value for *_, register in self.registers))):
            for index, value in enumerate(values):
                for name in set(_NAME.findall(value)):
                    if name in self.wires and (takers := self.taken.setdefault(name, [])) is not None:
                        takers.append((kind, index))

    def _groups(self):
        """Wire: the group whose registers alone it leads to, for those that lead to one."""
        found = {}
        for start in self.wires:
            todo = [start]
            while todo:
                name = todo[-1]
                if name in found and found[name] is not _UNDER_WAY:
                    todo.pop()
                    continue
                takers = self.taken.get(name)
                if not takers or name not in self.drivers:
                    found[name] = None
                    continue
                targets = {self.assigns[index][1] for kind, index in takers if kind == "assign"}
                unknown = [target for target in targets if target not in found and target in self.wires]
                if unknown:
                    found[name] = _UNDER_WAY
                    todo += unknown
                    continue
                groups = {self.registers[index][2].group for kind, index in takers if kind == "register"}
                groups |= {found.get(target) for target in targets}
                group = groups.pop() if len(groups) == 1 else None
                found[name] = None if group is _UNDER_WAY else group
        return found

    def _worth(self):
        """Wires that go into a block: those with several uses, of one group with an enable, and what is made of them.

        A simulator puts the others, with one use, into the expression that takes them.
        """
        groups = self._groups()
        able = {name for name, group in groups.items()
                if group and group[2] and int((_WIDTH.match(self.wires[name][1]) or "00")[1]) < _WIDEST}
        # What is made of a wire that stays must stay, and the other way round what it leads to must go.
        uses = collections.Counter(name for values in ((value for *_, value in self.assigns),
                                                       (register.value for *_, register in self.registers))
                                   for value in values for name in _NAME.findall(value))
        todo = [name for name in able if uses[name] > 1
                and not all(_PLAIN.fullmatch(self.assigns[index][3]) for index in self.drivers[name])]
        worth = set()
        while todo:
            name = todo.pop()
            if name not in worth:
                worth.add(name)
                todo += [self.assigns[index][1] for kind, index in self.taken[name] if kind == "assign"]
        while wide := {name for name in worth if name not in able or any(
                kind == "assign" and self.assigns[index][1] not in worth for kind, index in self.taken[name])}:
            worth -= wide
        return worth

    def text(self):
        """The module's lines, joined."""
        sunk = self._worth()
        parts = _Sets()
        for index, (*_, register) in enumerate(self.registers):
            parts.add(index)
            for name in _NAME.findall(register.value):
                if name in sunk:
                    parts.join(index, name)
        for _, name, _, value in self.assigns:
            if name in sunk:
                for other in _NAME.findall(value):
                    if other in sunk:
                        parts.join(name, other)
        blocks = {}
        for index in range(len(self.registers)):
            blocks.setdefault(parts.find(index), []).append(index)
        lines = list(self.lines)
        number = 0
        for members in blocks.values():
            registers = [self.registers[index] for index in members]
            wanted = [name for *_, register in registers for name in _NAME.findall(register.value) if name in sunk]
            if not wanted:
                continue
            body, order = self._in_order(wanted, sunk)
            edge, reset, enable = registers[0][2].group
            number += 1
            # Variables of a task are the simulator's local ones.
            block = [f"  task automatic sunk_{number};", *(f"    reg {self.wires[name][1]}{name} ;" for name in order),
                     "  begin", *(f"    {target} = {value};" for target, value in body),
                     *(f"    {register.target} <= {register.value};" for *_, register in registers), "  end",
                     "  endtask"]
            head = [*block, edge]
            if reset:
                head += [f"  {reset} begin", *(f"    {register.reset}" for *_, register in registers), "  end else"]
            head.append(f"  if ({enable}) sunk_{number};")
            for at, count, _ in registers:
                lines[at:at + count] = [None] * count
            lines[registers[0][0]] = "\n".join(head)
            for name in order:
                lines[self.wires[name][0]] = None
                for index in self.drivers[name]:
                    lines[self.assigns[index][0]] = None
        return "\n".join(line for line in lines if line is not None)

    def _in_order(self, wanted, sunk):
        """Assignments of the wanted wires and of all sunk ones before them, each after what it takes; names."""
        body, order, done, todo = [], [], set(), [(name, False) for name in reversed(wanted)]
        while todo:
            name, ready = todo.pop()
            if ready:
                order.append(name)
                body += [self.assigns[index][2:] for index in self.drivers[name]]
            elif name not in done:
                done.add(name)
                todo.append((name, True))
                todo += [(other, False) for index in self.drivers[name]
                         for other in _NAME.findall(self.assigns[index][3]) if other in sunk]
        return body, order


class _Sets:
    """Disjoint sets."""

    def __init__(self):
        self.parent = {}

    def add(self, item):
        self.parent.setdefault(item, item)

    def find(self, item):
        self.add(item)
        while self.parent[item] != item:
            self.parent[item] = item = self.parent[self.parent[item]]
        return item

    def join(self, one, other):
        self.parent[self.find(one)] = self.find(other)


_UNDER_WAY = object()
