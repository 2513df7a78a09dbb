// The second half of a design that was cut in two by its registers (hw/halves.py), in a thread of its own.
//
// In every cycle each half publishes the registers that the other one reads, takes the other's and makes its edge.
// What is published stands in one of two buffers by turns: a half is at most one cycle ahead, and writes the buffer that
// the other one has done with. Nothing is shared but these buffers, so the result does not depend on who is first.
//
// Registers of a part that sleeps stay as they were, so they are passed on only when it had an edge of late.
//
// Set by build.py: SLEEPERS as in harness.cpp; in exchanged.h FIRST_READS = F(half1_clk_7) ... and SECOND_READS, ports by
// their common names, FIRST_READS_vector ...: those whose registers are on the clock of a sleeper,
// SECOND_CLOCKS = SLEEPER(vector) ...: the sleepers' clocks that this half has registers on.
#pragma once
#include <atomic>
#include <exception>
#include <memory>
#include <thread>
#include <type_traits>
#include <utility>

#include "Vsecond.h"
#include "Vsecond___024root.h"
#include "Vtop.h"
#include "awake.h"
#include "exchanged.h"
#include "verilated.h"

namespace skipopu {

// How many states a half has published. Waits in a loop for as long as a cycle may take, then asleep: a simulation that
// stands still, or shares its processors, does not take their time.
class alignas(64) Turn {
public:
    void next() {
        // In one order with the look for sleepers in notify_one: a later store would be missed by one that falls asleep.
        count_.store(count_.load(std::memory_order_relaxed) + 1, std::memory_order_seq_cst);
        count_.notify_one();
    }
    void reach(uint64_t least) const {
        for (unsigned look = 0; look < kLooks; ++look) {
            if (count_.load(std::memory_order_acquire) >= least) return;
            if (look > kEager) pause();
        }
        for (uint64_t now; (now = count_.load(std::memory_order_acquire)) < least;) count_.wait(now);
    }

private:
    // A virtual machine may take a processor away that pauses often: most waits end before the first one.
    static constexpr unsigned kEager = 20000, kLooks = 30000;
    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }
    std::atomic<uint64_t> count_{0};
};

class SecondHalf {
public:
    SecondHalf() : half_(&context_) {
        half_.eval();  // initial values, which the other half reads
        thread_ = std::thread([this] { work(); });
    }
    ~SecondHalf() {
        stop_ = true;
        published_.next();
        thread_.join();
    }

    // From the first half, before the edge: its registers; `all` : nobody sleeps.
    void publish(const Vtop& first, bool all) {
        FromFirst& to = from_first_[cycle_ & 1];
        to.reset = first.rst;
#define SLEEPER(part) to.awake.part = first.part##_awake | all;
        SLEEPERS
#undef SLEEPER
#define F(port) to.port = first.port;
        SECOND_READS
#define SLEEPER(part) \
    if (moved_first_.now.part) { SECOND_READS_##part }
        SLEEPERS
#undef SLEEPER
#undef F
        published_.next();
    }

    // To the first half, before the same edge: registers of this one; `awake` is extended by who is for its sake.
    void take(Vtop& first, Awake& awake) {
        answered_.reach(cycle_ + 1);
        if (failed_) std::rethrow_exception(failed_);
        const FromSecond& from = from_second_[cycle_ & 1];
#define F(port) first.port = from.port;
        FIRST_READS
#define SLEEPER(part) \
    if (moved_first_.now.part) { FIRST_READS_##part }
        SLEEPERS
#undef SLEEPER
#undef F
        awake |= from.awake;
        moved_first_.edge(awake);
        ++cycle_;
    }

private:
#define F(port) std::remove_reference_t<decltype(std::declval<Vtop>().port)> port;
#define SLEEPER(part) SECOND_READS_##part
    struct alignas(64) FromFirst {
        Awake awake;
        uint8_t reset;
        SECOND_READS
        SLEEPERS
    };
#undef SLEEPER
#define SLEEPER(part) FIRST_READS_##part
    struct alignas(64) FromSecond {
        Awake awake;
        FIRST_READS
        SLEEPERS
    };
#undef SLEEPER
#undef F

    // Who had one of the last two edges: a buffer was written two edges ago.
    struct Moved {
        Awake now = everyone(), before = everyone();
        void edge(const Awake& awake) {
            now = before;
            now |= awake;
            before = awake;
        }
        static Awake everyone() {
            Awake all;
#define SLEEPER(part) all.part = 1;
            SLEEPERS
#undef SLEEPER
            return all;
        }
    };

    void work() {
        for (uint64_t cycle = 0;; ++cycle) {
            FromSecond& to = from_second_[cycle & 1];
#define SLEEPER(part) to.awake.part = half_.part##_awake;
            SLEEPERS
#undef SLEEPER
#define F(port) to.port = half_.port;
            FIRST_READS
#define SLEEPER(part) \
    if (moved_second_.now.part) { FIRST_READS_##part }
            SLEEPERS
#undef SLEEPER
#undef F
            answered_.next();
            published_.reach(cycle + 1);
            if (stop_) return;
            edge(from_first_[cycle & 1], to.awake);
        }
    }

    void edge(const FromFirst& from, Awake awake) {
#define F(port) half_.port = from.port;
        SECOND_READS
#define SLEEPER(part) \
    if (moved_second_.now.part) { SECOND_READS_##part }
        SLEEPERS
#undef SLEEPER
#undef F
        awake |= from.awake;
        moved_second_.edge(awake);
        half_.rst = from.reset;
        half_.clk = 1;
#define SLEEPER(part) half_.part##_clock = awake.part != 0;
        SECOND_CLOCKS
#undef SLEEPER
        try {
            half_.eval();
        } catch (...) {
            failed_ = std::current_exception();
        }
        half_.clk = 0;
        half_.rootp->__Vtrigprevexpr___TOP__clk__0 = 0;
#define SLEEPER(part)         \
    half_.part##_clock = 0; \
    half_.rootp->__Vtrigprevexpr___TOP__##part##_clock__0 = 0;
        SECOND_CLOCKS
#undef SLEEPER
    }

    VerilatedContext context_;
    Vsecond half_;
    FromFirst from_first_[2];
    FromSecond from_second_[2];
    Turn published_, answered_;
    uint64_t cycle_ = 0;
    Moved moved_first_, moved_second_;  // the same, for each thread
    std::atomic<bool> stop_{false};
    std::exception_ptr failed_;
    std::thread thread_;
};

}  // namespace skipopu
