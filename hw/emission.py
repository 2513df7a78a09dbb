"""What a component may ask about the form in which it is written out: Amaranth's ``platform`` here."""

from amaranth.hdl import ClockSignal, Instance, ResetSignal
from amaranth.lib.wiring import In

__all__ = ["Emission", "place"]


class Emission:
    """One conversion to RTLIL.

    primitives : instances of a device's slices instead of their behaviour
    modules : dict of module name to the component that is written once for all its instances; filled by `place`
    """

    def __init__(self, *, primitives=False):
        self.primitives = primitives
        self.modules = {}


def place(m, platform, name, make, *, module):
    """Add the component ``make()`` to ``m`` as submodule ``name``; returns what to connect its members to.

    During an `Emission` it is an instance of ``module``, which must stand for the same component wherever it is used:
    that one is elaborated once, however often it occurs. Without one it is an ordinary submodule.
    """
    if not isinstance(platform, Emission):
        m.submodules[name] = component = make()
        return component
    component = platform.modules.get(module) or platform.modules.setdefault(module, make())
    interface = component.signature.create(path=(name,))
    ports = {f"{'i' if member.flow is In else 'o'}_{'__'.join(map(str, path))}": value
             for path, member, value in component.signature.flatten(interface)}
    m.submodules[name] = Instance(module, i_clk=ClockSignal(), i_rst=ResetSignal(), **ports)
    return interface
