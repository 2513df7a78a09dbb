"""Everything that AMD's tools need to make an XRT kernel of the overlay: one folder, ready for `make`.

Offsets come from `hw/registers.py`, names from `hw/kernel.py`, sizes from `boards.py`. Nothing here needs AMD's tools;
what can be said about the files without them is checked by the project's tests.
"""

from collections import namedtuple
from pathlib import Path
from xml.etree import ElementTree

from skipopu.hw.kernel import FETCH_BITS, FETCH_PORT, KERNEL, Kernel, kernel_verilog, port_name
from skipopu.hw.registers import ADDRESS_BITS, MAP, Access, address, registers
from skipopu.sim.cache import cached_text, hardware_digest

__all__ = ["Argument", "arguments", "constraints", "export", "kernel_text", "kernel_xml", "link_config", "makefile",
           "package_script", "placement"]

CONTROL_PORT = "s_axi_control"
_ARRAYS = {"PORT_BASE", "TOKEN_TABLE", "ROUTES_FORCED"}  #: not arguments by themselves

Argument = namedtuple("Argument", "name offset bits port")
Argument.__doc__ = "A register that XRT knows by name: byte offset, 32 or 64 bits, memory port it points into or None."


def arguments(config):
    """Arguments of the kernel: the writable registers behind the control block, the program, one base per port."""
    found = [Argument(item.name, item.address, 32 * item.words, FETCH_PORT if item.name == "PROGRAM" else None)
             for item in MAP if item.access == Access.READ_WRITE and item.address >= 0x10 and item.name not in _ARRAYS]
    words = registers()["PORT_BASE"].words
    return found + [Argument(f"PORT_BASE_{port:02}", address("PORT_BASE", port), 32 * words, port_name(port))
                    for port in range(config.ports)]


def kernel_text(board, config):
    """Verilog of the kernel, from the cache while the hardware's sources and tools are the same."""
    options = {"memory_bits": board.memory_bits, "memory_burst": board.memory_burst}
    return cached_text("verilog", f"kernel-{config.name}-{hardware_digest(config, options)}.v",
                       lambda: kernel_verilog(Kernel(config=config, **options)))


def kernel_xml(board, config):
    """Description of the kernel for XRT (kernel.xml)."""
    root = ElementTree.Element("root", versionMajor="1", versionMinor="9")
    kernel = ElementTree.SubElement(
        root, "kernel", name=KERNEL, language="ip", vlnv=f"skipopu:kernel:{KERNEL}:1.0", attributes="",
        preferredWorkGroupSizeMultiple="0", workGroupSize="1", interrupt="true", hwControlProtocol="user_managed")
    ports = ElementTree.SubElement(kernel, "ports")
    ElementTree.SubElement(ports, "port", name=CONTROL_PORT, mode="slave", range=f"{1 << ADDRESS_BITS:#x}",
                           dataWidth="32", portType="addressable", base="0x0")
    for name, width in _masters(board, config):
        ElementTree.SubElement(ports, "port", name=name, mode="master", range="0xFFFFFFFFFFFFFFFF",
                               dataWidth=str(width), portType="addressable", base="0x0")
    args = ElementTree.SubElement(kernel, "args")
    for index, item in enumerate(arguments(config)):
        size = f"{item.bits // 8:#x}"
        ElementTree.SubElement(
            args, "arg", name=item.name, addressQualifier="1" if item.port else "0", id=str(index),
            port=item.port or CONTROL_PORT, size=size, offset=f"{item.offset:#05x}", hostOffset="0x0", hostSize=size,
            type="void*" if item.port else "uint")
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _masters(board, config):
    """(name, data bits) of every AXI master."""
    return [*((port_name(port), min(board.memory_bits, config.port_bits)) for port in range(config.ports)),
            (FETCH_PORT, min(board.memory_bits, FETCH_BITS))]


def link_config(board, config):
    """Configuration of `v++ --link`: which port stands at which pseudo-channel, and both clocks."""
    unit = f"{KERNEL}_1"
    banks = [*(f"sp={unit}.{port_name(port)}:HBM[{port}]" for port in range(config.ports)),
             f"sp={unit}.{FETCH_PORT}:HBM[0]"]
    return "\n".join([
        "[connectivity]", f"nk={KERNEL}:1:{unit}",
        "# No slr= line: it would confine the kernel to one die. pblocks.tcl spreads it over all of them.", *banks, "",
        "[clock]", f"freqHz={board.core_mhz}000000:{unit}.ap_clk", f"freqHz={board.memory_mhz}000000:{unit}.ap_clk_2",
        ""])


def package_script(board, config):
    """Tcl that packages the Verilog as an IP and as skipopu.xo."""
    registers_ = "\n".join(f"    {item.name} {item.offset:#05x} {item.bits} {item.port or '-'}"
                           for item in arguments(config))
    masters = " ".join(name for name, _ in _masters(board, config))
    return f"""# Makes {KERNEL}.xo: vivado -mode batch -source package_kernel.tcl
set here [file dirname [file normalize [info script]]]
set packaged [file join $here build packaged]
file delete -force [file join $here build]
create_project -force package [file join $here build project] -part {board.part}
add_files -norecurse [file join $here {KERNEL}.v]
add_files -fileset constrs_1 -norecurse [file join $here timing.xdc]
# The clocks that the constraints ask for are made by the platform: they come first.
set_property PROCESSING_ORDER LATE [get_files timing.xdc]
set_property USED_IN {{implementation}} [get_files timing.xdc]
set_property top {KERNEL} [current_fileset]
update_compile_order -fileset sources_1

ipx::package_project -root_dir $packaged -vendor skipopu -library kernel -taxonomy /KernelIP -import_files \\
    -set_current false
ipx::unload_core [file join $packaged component.xml]
ipx::edit_ip_in_project -upgrade true -name edit -directory $packaged [file join $packaged component.xml]
set core [ipx::current_core]
set_property version 1.0 $core
foreach parameter [ipx::get_user_parameters -of_objects $core] {{
    ipx::remove_user_parameter [get_property NAME $parameter] $core
}}
set_property sdx_kernel true $core
set_property sdx_kernel_type rtl $core
set_property vitis_drc {{ctrl_protocol user_managed}} $core
set_property ipi_drc {{ignore_freq_hz true}} $core

ipx::associate_bus_interfaces -busif {CONTROL_PORT} -clock ap_clk $core
ipx::associate_bus_interfaces -clock ap_clk -reset ap_rst_n $core
ipx::associate_bus_interfaces -clock ap_clk_2 -reset ap_rst_n_2 $core
foreach port {{{masters}}} {{
    ipx::associate_bus_interfaces -busif $port -clock ap_clk_2 $core
}}
ipx::infer_bus_interface interrupt xilinx.com:signal:interrupt_rtl:1.0 $core

# Arguments: name, offset, bits, memory port it points into.
set block [ipx::get_address_blocks reg0 -of_objects [ipx::get_memory_maps {CONTROL_PORT} -of_objects $core]]
foreach {{name offset bits port}} {{
{registers_}
}} {{
    set register [ipx::add_register $name $block]
    set_property address_offset $offset $register
    set_property size $bits $register
    if {{$port ne "-"}} {{
        ipx::add_register_parameter ASSOCIATED_BUSIF $register
        set_property value $port [ipx::get_register_parameters ASSOCIATED_BUSIF -of_objects $register]
    }}
}}
ipx::create_xgui_files $core
ipx::update_checksums $core
ipx::check_integrity $core
ipx::save_core $core
close_project -delete

package_xo -force -xo_path [file join $here {KERNEL}.xo] -kernel_name {KERNEL} -ip_directory $packaged \\
    -kernel_xml [file join $here kernel.xml]
"""


def constraints(board):
    """XDC: what crosses between the clocks, and how far it may go in which time."""
    return f"""# Every path between the clocks runs through a Gray-coded FIFO or a synchroniser. One period of the
# faster clock ({board.memory_mhz} MHz) as the longest way keeps the bits of a Gray code within one step of each other.
set core [get_clocks -of_objects [get_ports ap_clk]]
set memory [get_clocks -of_objects [get_ports ap_clk_2]]
set_max_delay -datapath_only -from $core -to $memory {1000 / board.memory_mhz:.3f}
set_max_delay -datapath_only -from $memory -to $core {1000 / board.memory_mhz:.3f}
# First and second flip-flop of every synchroniser belong side by side.
set synchronisers {{.*(produce_cdc|consume_cdc|rst_cdc|memory_reset)/stage\\d+_reg.*}}
set_property ASYNC_REG TRUE [get_cells -hierarchical -regexp $synchronisers]
# The FIFOs' resets are asserted at once and released through their synchronisers.
set_false_path -to [get_pins -hierarchical -regexp {{.*/rst_cdc/stage\\d+_reg.*/(CLR|PRE)}}]
# Resets reach wide registers after two of their own.
set_false_path -from [get_ports {{ap_rst_n ap_rst_n_2}}]
"""


def placement(board, config):
    """Tcl that assigns the units to dies before placement."""
    pairs = config.columns // 2

    def columns(first, last):
        return f"for {{set n {first}}} {{$n < {last}}} {{incr n}}"

    return f"""# Run before placement (see Makefile). Memory stands at SLR0, and so does what talks to it; the columns
# of the array are shared between the other dies. Soft: the placer may leave them where that shortens a path.
set top [get_cells -hierarchical -filter {{REF_NAME == {KERNEL} || ORIG_REF_NAME == {KERNEL}}}]
if {{[llength $top] != 1}} {{
    error "expected one {KERNEL} in the design, found [llength $top]"
}}

proc assign {{pblock die parts}} {{
    global top
    create_pblock $pblock
    resize_pblock [get_pblocks $pblock] -add $die
    set_property IS_SOFT TRUE [get_pblocks $pblock]
    foreach part $parts {{
        set cells [get_cells -quiet $top/$part]
        if {{[llength $cells] == 0}} {{
            puts "WARNING: $top/$part is not in the design; it stays where the placer puts it"
            continue
        }}
        add_cells_to_pblock [get_pblocks $pblock] $cells
    }}
}}

assign skipopu_memory SLR0 {{
    crossing* overlay/load overlay/store overlay/fetch overlay/control overlay/csr
}}
set low {{overlay/compute/feed overlay/compute/mbuf overlay/kvbuf}}
{columns(0, pairs // 2)} {{ lappend low overlay/compute/array/pair$n }}
assign skipopu_array_low SLR1 $low
set high {{overlay/vector}}
{columns(pairs // 2, pairs)} {{ lappend high overlay/compute/array/pair$n }}
assign skipopu_array_high SLR{board.slrs - 1} $high
"""


def makefile(board):
    """Makefile of the folder."""
    return f"""# Needs Vitis (vivado, v++) and XRT in the environment: source their settings64.sh and setup.sh first.
PLATFORM ?= {board.platform}

.PHONY: all lint binding clean
all: {KERNEL}.xclbin

{KERNEL}.xo: package_kernel.tcl {KERNEL}.v kernel.xml timing.xdc
\tvivado -mode batch -nojournal -nolog -source package_kernel.tcl

{KERNEL}.xclbin: {KERNEL}.xo link.cfg pblocks.tcl
\tv++ --link --target hw --platform $(PLATFORM) --config link.cfg --save-temps \\
\t  --vivado.prop run.impl_1.STEPS.PLACE_DESIGN.TCL.PRE=$(CURDIR)/pblocks.tcl --output $@ $<

# Register access for Python, where pyxrt has none (XRT 2.15 and later). Needs pybind11.
binding: xrt_ip.cpp
\tg++ -O2 -std=c++17 -shared -fPIC `python3 -m pybind11 --includes` -I$(XILINX_XRT)/include xrt_ip.cpp \\
\t  -L$(XILINX_XRT)/lib -lxrt_coreutil -luuid -o skipopu_xrt_ip`python3-config --extension-suffix`

lint:
\tverilator --lint-only -Wall --top-module {KERNEL} lint.vlt {KERNEL}.v -y $(XILINX_VIVADO)/data/verilog/src/unisims

clean:
\trm -rf build _x .Xil *.xo *.xclbin *.log skipopu_xrt_ip*.so
"""


_BINDING = """// Registers of a kernel for Python: pyxrt offers none since XRT 2.15. Build it with `make binding`.
// It opens the card by itself and shares no C++ type with pyxrt, so that both may use different versions of pybind11.
#include <cstdint>
#include <memory>
#include <string>

#include <pybind11/pybind11.h>
#include <xrt/experimental/xrt_ip.h>
#include <xrt/xrt_device.h>

namespace py = pybind11;

PYBIND11_MODULE(skipopu_xrt_ip, module) {
    py::class_<xrt::ip>(module, "ip")
        .def(py::init([](unsigned index, const std::string &xclbin, const std::string &name) {
            xrt::device device(index);
            return std::make_unique<xrt::ip>(device, device.load_xclbin(xclbin), name);
        }))
        .def("read_register", &xrt::ip::read_register)
        .def("write_register", &xrt::ip::write_register);
}
"""

_LINT = """`verilator_config
// Yosys wrote the Verilog: it states widths by context, keeps registers' start values, names wires that nobody reads.
lint_off -rule WIDTHEXPAND
lint_off -rule WIDTHTRUNC
lint_off -rule PROCASSINIT
lint_off -rule UNUSEDSIGNAL
lint_off -rule DECLFILENAME
// Multiplexers are written as cases in which the first match counts.
lint_off -rule CASEOVERLAP
// A port may be called like a module's instance elsewhere in the hierarchy.
lint_off -rule VARHIDDEN
// XRT asks for this name of a port.
lint_off -rule SYMRSVDWORD -file "*" -match "*'interrupt'*"
// A domain's reset is synchronous everywhere but in the FIFOs between domains, whose far side it also clears at once.
lint_off -rule SYNCASYNCNET -file "*" -match "*_held'*"
// Outputs of a slice that nobody needs.
""" + "".join(f"""lint_off -rule PINMISSING -file "*{KERNEL}.v" -match "*pin: '{pin}'*"\n""" for pin in (
    "ACOUT", "BCOUT", "CARRYCASCOUT", "CARRYOUT", "MULTSIGNOUT", "OVERFLOW", "P", "PATTERNBDETECT", "PATTERNDETECT",
    "PCOUT", "UNDERFLOW", "XOROUT"))


def _readme(board, config):
    return f"""# skipopu on the {board.title}

An RTL kernel for XRT, made by `skipopu export --board {board.name}` for configuration {config.name}
({config.config_hash:#010x}). It has been linted and elaborated by open tools; it has never been through Vivado, and
never run on a card.

1. Install Vitis, XRT and the platform `{board.platform}`; source their settings.
2. `make` packages the kernel and links `{KERNEL}.xclbin`; this takes hours. Look into the timing report of `v++`
   (`_x/`): the clocks are {board.core_mhz} MHz (core) and {board.memory_mhz} MHz (memory).
3. `make binding` builds register access for Python, and `export PYTHONPATH=$PWD:$PYTHONPATH` makes it known (not needed
   where `pyxrt.ip` exists).
4. `export SKIPOPU_XCLBIN=$PWD/{KERNEL}.xclbin`
5. `skipopu selftest --device xrt --config {config.name}`
6. `skipopu generate -m smollm2 --device xrt --config {config.name} -p "..."`

| file | what |
|---|---|
| `{KERNEL}.v` | the kernel: `{CONTROL_PORT}`, `{port_name(0)}`..`{port_name(config.ports - 1)}`, `{FETCH_PORT}` |
| `kernel.xml` | arguments and ports for XRT |
| `package_kernel.tcl` | Verilog to `{KERNEL}.xo` |
| `link.cfg` | ports to pseudo-channels of {board.channel_bytes >> 20} MiB, clocks |
| `timing.xdc` | paths between the clocks |
| `pblocks.tcl` | units to dies |
| `lint.vlt` | what `make lint` does not report, and why |
| `xrt_ip.cpp` | register access for Python |
"""


def export(board, config, folder):
    """Write everything into ``folder``, which is made if need be; returns the names of the files.

    Raises BoardError if the configuration does not fit the board.
    """
    board.check(config)
    files = {
        f"{KERNEL}.v": kernel_text(board, config), "kernel.xml": kernel_xml(board, config),
        "package_kernel.tcl": package_script(board, config), "link.cfg": link_config(board, config),
        "timing.xdc": constraints(board), "pblocks.tcl": placement(board, config), "Makefile": makefile(board),
        "lint.vlt": _LINT, "xrt_ip.cpp": _BINDING, "README.md": _readme(board, config),
    }
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (target / name).write_text(text)
    return sorted(files)
