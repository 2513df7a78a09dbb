// Simulation of one top: the Verilated design, its memories and its register master, behind a C interface for ctypes.
//
// Every output of the design is a function of its registers. So the outputs read before an edge are the ones that take
// part in it. Nothing happens at a falling edge: but for waveforms the model is told that the clock was low, which saves
// it an evaluation of all that depends on inputs.
//
// Set by build.py: PORTS, PORT_BITS, PORT_LIST = PORT(0) PORT(1) ..., TRACE in the build with waveforms, EVENTS for a
// top that says what its units do (event_*), SLEEPERS = SLEEPER(kvbuf) ... for parts that have clocks of their own, and
// HALVES for a design in two halves, of which the top is the first (second_half.h).
#include <memory>
#include <stdexcept>

#include "Vtop.h"
#include "Vtop___024root.h"
#include "awake.h"
#include "axi_port.h"
#ifdef HALVES
#include "second_half.h"
#else
#define FIRST_CLOCKS SLEEPERS
#endif
#include "verilated.h"
#ifdef TRACE
#include "verilated_fst_c.h"
#endif

#define API extern "C" __attribute__((visibility("default")))

// Verilator's default ends the process; an exception reaches the caller as an error text.
void vl_fatal(const char* file, int line, const char*, const char* message) {
    throw std::runtime_error(std::string("design: ") + file + ":" + std::to_string(line) + ": " + message);
}

namespace skipopu {

enum Stop { kLimit = 0, kIrq = 1, kError = 2 };

// What happened in one cycle: an instruction left control (or was dropped there), units began or finished a command,
// data began or ceased to move on a port. Mirrored field by field in native.py.
struct Event {
    uint64_t cycle;
    uint32_t pc, memory;  // memory: bit per port, data moved
    uint8_t dispatch, dropped, start, done;  // start and done: bit per unit
};
static_assert(PORTS <= 32);
using DataPort = Port<PORT_BITS / 8, true>;
using FetchPort = Port<32, false>;

class Simulation {
public:
    Simulation(uint8_t** memories, const uint64_t* sizes, const uint64_t* bases, const PortConfig* config) {
#ifdef TRACE
        context_.traceEverOn(true);
#endif
        top_ = std::make_unique<Vtop>(&context_);
        Vtop* t = top_.get();
#define ADDRESS(n, c) {&t->n##c##addr, &t->n##c##len, &t->n##c##size, &t->n##c##burst, &t->n##c##valid, &t->n##c##ready}
#define READ(n) ReadSignals{ADDRESS(n, ar), &t->n##rdata, &t->n##rresp, &t->n##rlast, &t->n##rvalid, &t->n##rready}
#define WRITE(n)                                                                                                  \
    WriteSignals{ADDRESS(n, aw), &t->n##wdata,  &t->n##wstrb,  &t->n##wlast, &t->n##wvalid,                       \
                 &t->n##wready,  &t->n##bresp, &t->n##bvalid, &t->n##bready}
#define PORT(i)                                                                                                   \
    ports_[i] = std::make_unique<DataPort>("m" #i, watch_, config[i], READ(m##i##_axi_), WRITE(m##i##_axi_),      \
                                           memories[i], sizes[i], bases[i]);
        PORT_LIST
        fetch_ = std::make_unique<FetchPort>("mi", watch_, config[PORTS], READ(mi_axi_), WriteSignals{}, memories[0],
                                             sizes[0], bases[0]);
#ifdef HALVES
        top_->eval();  // initial values, which the other half reads
        second_ = std::make_unique<SecondHalf>();
#endif
        reset(2);
    }
    ~Simulation() {
        stop_trace();
        top_->final();
    }

    void reset(uint64_t cycles) {
        watch_.text.clear();
        top_->rst = 1;
        top_->s_axil_awvalid = top_->s_axil_wvalid = top_->s_axil_bready = 0;
        top_->s_axil_arvalid = top_->s_axil_rready = 0;
        for (auto& port : ports_) port->reset();
        fetch_->reset();
        resetting_ = true;
        while (cycles--) publish(), clock();
        top_->rst = 0;
        publish(), clock();  // for a top whose reset is a register
        resetting_ = false;
    }

    Stop run(uint64_t cycles, bool stop_on_irq) {
        while (cycles--) {
            if (stop_on_irq && top_->irq) return kIrq;
            cycle();
            if (!watch_.text.empty()) return kError;
        }
        return stop_on_irq && top_->irq ? kIrq : kLimit;
    }

    // The AXI response code, or -1 when the design did not answer within `limit` cycles.
    int write(uint32_t address, uint32_t value, uint64_t limit) {
        Vtop& t = *top_;
        t.s_axil_awaddr = address, t.s_axil_wdata = value, t.s_axil_wstrb = 15;
        t.s_axil_awvalid = t.s_axil_wvalid = t.s_axil_bready = 1;
        int code = -1;
        while (limit-- && code < 0 && watch_.text.empty()) {
            const bool address_taken = t.s_axil_awvalid && t.s_axil_awready, data_taken = t.s_axil_wvalid && t.s_axil_wready;
            if (t.s_axil_bvalid) code = t.s_axil_bresp;
            cycle();
            if (address_taken) t.s_axil_awvalid = 0;
            if (data_taken) t.s_axil_wvalid = 0;
        }
        t.s_axil_awvalid = t.s_axil_wvalid = t.s_axil_bready = 0;
        return code;
    }

    int read(uint32_t address, uint32_t* value, uint64_t limit) {
        Vtop& t = *top_;
        t.s_axil_araddr = address;
        t.s_axil_arvalid = t.s_axil_rready = 1;
        int code = -1;
        while (limit-- && code < 0 && watch_.text.empty()) {
            const bool taken = t.s_axil_arvalid && t.s_axil_arready;
            if (t.s_axil_rvalid) code = t.s_axil_rresp, *value = t.s_axil_rdata;
            cycle();
            if (taken) t.s_axil_arvalid = 0;
        }
        t.s_axil_arvalid = t.s_axil_rready = 0;
        return code;
    }

    bool trace(const char* path, uint64_t first, uint64_t last) {
#ifdef TRACE
        stop_trace();
        trace_path_ = path, trace_first_ = first, trace_last_ = last;
        return true;
#else
        return (void)path, (void)first, (void)last, false;
#endif
    }
    void stop_trace() {
#ifdef TRACE
        if (trace_file_) trace_file_->close();
        trace_file_.reset();
        trace_path_.clear();
#endif
    }

    template <typename F>
    auto with_port(unsigned index, F&& f) {
        return index < PORTS ? f(*ports_[index]) : f(*fetch_);
    }

    // Events from now on are kept until they are taken; those kept so far are dropped.
    bool record(bool on) {
        events_.clear();
        recording_ = on, moved_ = 0;
        for (unsigned port = 0; port < PORTS; ++port) beats_[port] = ports_[port]->beats();
#ifdef EVENTS
        return true;
#else
        return false;
#endif
    }
    size_t take_events(Event* out, size_t most) {
        const size_t count = std::min(most, events_.size());
        std::copy_n(events_.begin(), count, out);
        events_.erase(events_.begin(), events_.begin() + count);
        return count;
    }
    size_t events() const { return events_.size(); }

    // Clock parts also while nothing happens in them.
    void sleepless(bool on) { sleepless_ = on; }
    // Clocks of each sleeper since construction, in the order of SLEEPERS; returns how many there are.
    size_t clocks(uint64_t* out) const {
        size_t count = 0;
#define SLEEPER(part) out[count++] = clocks_.part;
        SLEEPERS
#undef SLEEPER
        return count;
    }

    uint64_t now() const { return watch_.cycle; }
    bool irq() const { return top_->irq; }
    std::string error() const { return watch_.text; }
    void fail(const char* text) { watch_.text = text; }

private:
    void cycle() {
        publish();
        for (auto& port : ports_) port->tick(watch_.cycle);
        fetch_->tick(watch_.cycle);
        clock();
    }

    // To the second half: it can make this cycle's edge.
    void publish() {
#ifdef HALVES
        second_->publish(*top_, resetting_ | sleepless_);
#endif
    }

    void clock() {
        Awake awake;
#define SLEEPER(part) awake.part = top_->part##_awake | resetting_ | sleepless_;
        SLEEPERS
#undef SLEEPER
#ifdef HALVES
        second_->take(*top_, awake);
#endif
        top_->clk = 1;
#define SLEEPER(part) clocks_.part += top_->part##_clock = awake.part != 0;
        SLEEPERS
#undef SLEEPER
        top_->eval();
#ifdef TRACE
        dump(0);
#endif
        top_->clk = 0;
#define SLEEPER(part) top_->part##_clock = 0;
        SLEEPERS
#undef SLEEPER
#ifdef TRACE
        top_->eval();
        dump(1);
#else
#define SLEEPER(part) top_->rootp->__Vtrigprevexpr___TOP__##part##_clock__0 = 0;
        top_->rootp->__Vtrigprevexpr___TOP__clk__0 = 0;
        FIRST_CLOCKS
#undef SLEEPER
#endif
#ifdef EVENTS
        if (recording_) {
            uint32_t moved = 0;
            for (unsigned port = 0; port < PORTS; ++port) {
                moved |= uint32_t(ports_[port]->beats() != beats_[port]) << port;
                beats_[port] = ports_[port]->beats();
            }
            if (top_->event_dispatch | top_->event_start | top_->event_done | (moved != moved_))
                events_.push_back({watch_.cycle, top_->event_pc, moved, top_->event_dispatch, top_->event_dropped,
                                   top_->event_start, top_->event_done});
            moved_ = moved;
        }
#endif
        ++watch_.cycle;
    }

#ifdef TRACE
    // Two time units a cycle, so cycle n begins at time 2n.
    void dump(unsigned half) {
        if (trace_path_.empty() || watch_.cycle < trace_first_) return;
        if (watch_.cycle > trace_last_) return stop_trace();
        if (!trace_file_) {
            trace_file_ = std::make_unique<VerilatedFstC>();
            top_->trace(trace_file_.get(), 99);
            trace_file_->open(trace_path_.c_str());
        }
        trace_file_->dump(2 * watch_.cycle + half);
    }
    std::unique_ptr<VerilatedFstC> trace_file_;
    std::string trace_path_;
    uint64_t trace_first_ = 0, trace_last_ = 0;
#endif
#define SLEEPER(part) uint64_t part = 0;
    struct Clocks {
        SLEEPERS
    } clocks_;
#undef SLEEPER
    std::vector<Event> events_;
    bool recording_ = false, sleepless_ = false, resetting_ = false;
    uint32_t moved_ = 0;
    uint64_t beats_[PORTS] = {};
    VerilatedContext context_;
    std::unique_ptr<Vtop> top_;
#ifdef HALVES
    std::unique_ptr<SecondHalf> second_;
#endif
    Watch watch_;
    std::unique_ptr<DataPort> ports_[PORTS];
    std::unique_ptr<FetchPort> fetch_;
};

// No exception may pass the C boundary.
template <typename F>
static int guarded(Simulation* s, F&& f) {
    try {
        return f();
    } catch (const std::exception& e) {
        s->fail(e.what());
        return kError;
    }
}

}  // namespace skipopu

using namespace skipopu;

API Simulation* sim_new(uint8_t** memories, const uint64_t* sizes, const uint64_t* bases, const PortConfig* config) {
    try {
        return new Simulation(memories, sizes, bases, config);
    } catch (const std::exception& e) {
        fprintf(stderr, "%s\n", e.what());
        return nullptr;
    }
}
API void sim_delete(Simulation* s) { delete s; }
API int sim_reset(Simulation* s, uint64_t cycles) {
    return guarded(s, [&] { return s->reset(cycles), 0; });
}
API int sim_run(Simulation* s, uint64_t cycles, int stop_on_irq) {
    return guarded(s, [&] { return int(s->run(cycles, stop_on_irq)); });
}
API int sim_write(Simulation* s, uint32_t address, uint32_t value, uint64_t limit) {
    return guarded(s, [&] { return s->write(address, value, limit); });
}
API int sim_read(Simulation* s, uint32_t address, uint32_t* value, uint64_t limit) {
    return guarded(s, [&] { return s->read(address, value, limit); });
}
API uint64_t sim_cycle(const Simulation* s) { return s->now(); }
API int sim_irq(const Simulation* s) { return s->irq(); }
API void sim_error(const Simulation* s, char* text, size_t size) { snprintf(text, size, "%s", s->error().c_str()); }
API int sim_trace(Simulation* s, const char* path, uint64_t first, uint64_t last) { return s->trace(path, first, last); }
API void sim_stop_trace(Simulation* s) { s->stop_trace(); }
API int sim_record(Simulation* s, int on) { return s->record(on); }
API void sim_sleepless(Simulation* s, int on) { s->sleepless(on); }
API size_t sim_clocks(const Simulation* s, uint64_t* out) { return s->clocks(out); }
API size_t sim_events(const Simulation* s) { return s->events(); }
API size_t sim_take_events(Simulation* s, Event* out, size_t most) { return s->take_events(out, most); }
API void sim_stats(Simulation* s, unsigned port, PortStats* out, int clear) {
    s->with_port(port, [&](auto& p) {
        *out = p.stats;
        if (clear) p.stats = {};
    });
}
// `burst` counts from the next burst of that direction; kNever selects by address instead.
API void sim_inject_error(Simulation* s, unsigned port, int write, uint64_t burst, uint64_t low, uint64_t high, int code) {
    s->with_port(port, [&](auto& p) {
        const uint64_t index = burst == kNever ? kNever : p.bursts(write) + burst;
        p.rules.push_back({bool(write), index, low, high, uint8_t(code)});
    });
}
API void sim_inject_hang(Simulation* s, unsigned port, uint64_t beats) {
    s->with_port(port, [&](auto& p) { p.hang_after = beats == kNever ? kNever : p.beats() + beats; });
}
API void sim_clear_rules(Simulation* s, unsigned port) {
    s->with_port(port, [&](auto& p) { p.rules.clear(); });
}
