// One AXI4 slave port of the simulated memory: protocol, data, injected faults, statistics and protocol watchers.
// Nothing here allocates or searches while the clock runs; beats are copied whole.
#pragma once
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "hbm.h"
#include "memory_model.h"

namespace skipopu {

constexpr uint64_t kNever = ~uint64_t(0);
enum Response : uint8_t { kOkay = 0, kSlvErr = 2, kDecErr = 3 };
enum Channel { kAR, kR, kAW, kW, kB, kChannels };

// Mirrored field by field in native.py.
struct PortConfig {
    uint64_t read_latency, write_latency, rate, max_outstanding, seed;
    uint64_t stall[kChannels];  // probability of a stalled cycle, in 1/2^32
    HbmConfig hbm;
};
struct PortStats {
    uint64_t bytes_read, bytes_written, read_bursts, write_bursts, busy_cycles, read_wait_cycles, write_wait_cycles;
};

// An injected error: bursts of one direction, by number or by an address range that a beat touches.
struct ErrorRule {
    bool write;
    uint64_t burst, low, high;
    uint8_t code;
    bool hits(bool is_write, uint64_t index, uint64_t address, unsigned bytes) const {
        return write == is_write && (burst != kNever ? burst == index : address + bytes > low && address < high);
    }
};

// Collects the first violation; every later one is a consequence.
class Watch {
public:
    std::string text;
    uint64_t cycle = 0;
    void __attribute__((format(printf, 3, 4))) violation(const char* port, const char* format, ...) {
        if (!text.empty()) return;
        char what[200], line[300];
        va_list args;
        va_start(args, format);
        vsnprintf(what, sizeof what, format, args);
        va_end(args);
        snprintf(line, sizeof line, "cycle %llu, port %s: %s", (unsigned long long)cycle, port, what);
        text = line;
    }
};

template <typename T>
class Ring {  // fixed capacity, a power of two
public:
    explicit Ring(size_t least) {
        size_t size = 1;
        while (size < least) size *= 2;
        items_.resize(size);
    }
    size_t count() const { return tail_ - head_; }
    T& front() { return items_[head_ & (items_.size() - 1)]; }
    void push(const T& item) { items_[tail_++ & (items_.size() - 1)] = item; }
    void pop() { ++head_; }
    void clear() { head_ = tail_ = 0; }

private:
    std::vector<T> items_;
    size_t head_ = 0, tail_ = 0;
};

class Random {  // xorshift64
public:
    explicit Random(uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15u | 1) {}
    bool chance(uint64_t probability) {
        if (!probability) return false;
        state_ ^= state_ << 13;
        state_ ^= state_ >> 7;
        state_ ^= state_ << 17;
        return (state_ >> 32) < probability;
    }

private:
    uint64_t state_;
};

// Address channel as seen by the slave, and the check that a stalled request does not change.
struct AddressSignals {
    const uint64_t* address;
    const uint8_t *length, *size, *burst, *valid;
    uint8_t* ready;
};
struct Request {
    uint64_t address;
    uint8_t length, size, burst;
    bool operator==(const Request&) const = default;
};
struct ReadSignals {
    AddressSignals ar;
    void* data;
    uint8_t *response, *last, *valid;
    const uint8_t* ready;
};
struct WriteSignals {
    AddressSignals aw;
    const void *data, *strobe;
    const uint8_t *last, *valid;
    uint8_t* ready;
    uint8_t *response, *response_valid;
    const uint8_t* response_ready;
};

template <unsigned BYTES, bool WRITES>
class Port {
public:
    PortStats stats{};
    std::vector<ErrorRule> rules;
    uint64_t hang_after = kNever;  // beats

    Port(const char* name, Watch& watch, const PortConfig& config, const ReadSignals& read, const WriteSignals& write,
         uint8_t* memory, uint64_t size, uint64_t base)
        : name_(name), watch_(watch), config_(config), r_(read), w_(write), memory_(memory), size_(size), base_(base),
          model_(config.hbm.enabled ? std::unique_ptr<MemoryModel>(std::make_unique<HbmMemory>(config.hbm, BYTES))
                                    : std::make_unique<IdealMemory>(config.read_latency, config.write_latency,
                                                                    config.rate)),
          random_(config.seed), reads_(config.max_outstanding), writes_(config.max_outstanding),
          responses_(config.max_outstanding) {}

    // Drives this cycle's inputs of the design from its registered outputs, and does the transfers of the next edge.
    void tick(uint64_t cycle) {
        model_->tick(cycle);
        const bool alive = beats_ < hang_after;
        const bool busy = reads_.count() || in_flight_writes();
        stats.busy_cycles += busy;
        tick_read(cycle, alive);
        if constexpr (WRITES) tick_write(cycle, alive);
    }

    // In reset the design may drop anything it had asserted.
    void reset() {
        reads_.clear(), writes_.clear(), responses_.clear();
        r_presented_ = b_presented_ = ar_held_ = aw_held_ = w_held_ = false;
        *r_.ar.ready = *r_.valid = 0;
        if constexpr (WRITES) *w_.aw.ready = *w_.ready = *w_.response_valid = 0;
    }

    uint64_t beats() const { return beats_; }
    uint64_t bursts(bool write) const { return write ? write_index_ : read_index_; }

private:
    struct Burst {
        uint64_t address, ready, index;
        unsigned beats, left;
        uint8_t code;
    };

    size_t in_flight_writes() const { return writes_.count() + responses_.count(); }

    bool inside(uint64_t address) const {  // the base is beat aligned and the size whole beats, checked by native.py
        return address - base_ < size_;
    }
    uint8_t code_of(bool write, uint64_t index, uint64_t address) const {
        if (!inside(address)) return kDecErr;
        for (const ErrorRule& rule : rules)
            if (rule.hits(write, index, address, BYTES)) return rule.code;
        return kOkay;
    }

    // One cycle of an address channel; returns true when `burst` was taken.
    bool accept(const AddressSignals& a, const char* channel, bool can_take, Channel stall, bool& held, Request& kept,
                Burst& burst, uint64_t& index) {
        const bool ready = can_take && !random_.chance(config_.stall[stall]);
        *a.ready = ready;
        if (!*a.valid) {
            if (held) watch_.violation(name_, "%svalid dropped before %sready", channel, channel);
            return held = false;
        }
        const Request now{*a.address, *a.length, *a.size, *a.burst};
        if (held && !(now == kept)) watch_.violation(name_, "%s payload changed before %sready", channel, channel);
        kept = now;
        held = !ready;
        if (!ready) return false;
        const unsigned beats = now.length + 1u;
        if (now.burst != 1) watch_.violation(name_, "%sburst is %u, expected 1 (INCR)", channel, now.burst);
        if ((1u << now.size) != BYTES) watch_.violation(name_, "%ssize is %u, not a full beat", channel, now.size);
        if (now.address % BYTES)
            watch_.violation(name_, "%saddr 0x%llx is not beat aligned", channel, (unsigned long long)now.address);
        if (now.address % 4096 + uint64_t(beats) * BYTES > 4096)
            watch_.violation(name_, "%s burst of %u beats at 0x%llx crosses a 4 KiB boundary", channel, beats,
                             (unsigned long long)now.address);
        burst = {now.address, 0, index++, beats, beats, kOkay};
        return true;
    }

    void tick_read(uint64_t cycle, bool alive) {
        if (!r_presented_) {
            r_presented_ = reads_.count() && alive && model_->read_beat_allowed && cycle >= reads_.front().ready &&
                           !random_.chance(config_.stall[kR]);
            if (r_presented_) present(reads_.front());
            *r_.valid = r_presented_;
        }
        if (r_presented_) {
            if (*r_.ready) {
                Burst& burst = reads_.front();
                r_presented_ = false;
                stats.bytes_read += BYTES;
                ++beats_;
                burst.address += BYTES;
                if (!--burst.left) reads_.pop();
            } else {
                ++stats.read_wait_cycles;
            }
        }
        Burst burst;
        if (accept(r_.ar, "ar", alive && reads_.count() < config_.max_outstanding, kAR, ar_held_, ar_kept_, burst,
                   read_index_)) {
            burst.ready = model_->read_accepted(cycle, burst.address, burst.beats);
            reads_.push(burst);
            ++stats.read_bursts;
            for (unsigned line = 0; line < 512; line += 64) prefetch(burst.address + line);
        }
    }

    void present(const Burst& burst) {
        const uint8_t code = code_of(false, burst.index, burst.address);
        if (code == kOkay)
            std::memcpy(r_.data, memory_ + (burst.address - base_), BYTES);
        else
            std::memset(r_.data, 0, BYTES);
        prefetch(burst.address + 512);
        *r_.response = code;
        *r_.last = burst.left == 1;
        model_->read_beat_moved();
    }

    // Streams of several megabytes live in memory, not in the cache: ask for a beat long before it is copied.
    void prefetch(uint64_t address) const {
        if (inside(address)) __builtin_prefetch(memory_ + (address - base_));
    }

    void tick_write(uint64_t cycle, bool alive) {
        if (!b_presented_) {
            b_presented_ = responses_.count() && alive && cycle >= responses_.front().ready &&
                           !random_.chance(config_.stall[kB]);
            if (b_presented_) *w_.response = responses_.front().code;
            *w_.response_valid = b_presented_;
        }
        if (b_presented_ && *w_.response_ready) {
            b_presented_ = false;
            responses_.pop();
        }
        Burst burst;
        if (accept(w_.aw, "aw", alive && in_flight_writes() < config_.max_outstanding, kAW, aw_held_, aw_kept_, burst,
                   write_index_)) {
            writes_.push(burst);
            ++stats.write_bursts;
        }
        const bool ready = writes_.count() && alive && model_->write_beat_allowed && !random_.chance(config_.stall[kW]);
        *w_.ready = ready;
        if (!*w_.valid) {
            if (w_held_) watch_.violation(name_, "wvalid dropped before wready");
            w_held_ = false;
            return;
        }
        if (w_held_ && (std::memcmp(w_data_, w_.data, BYTES) || std::memcmp(w_strobe_, w_.strobe, kStrobeBytes) ||
                        w_last_ != *w_.last))
            watch_.violation(name_, "w payload changed before wready");
        w_held_ = !ready;
        if (ready) {
            take_beat(cycle);
        } else {
            ++stats.write_wait_cycles;
            std::memcpy(w_data_, w_.data, BYTES);
            std::memcpy(w_strobe_, w_.strobe, kStrobeBytes);
            w_last_ = *w_.last;
        }
    }

    void take_beat(uint64_t cycle) {
        Burst& burst = writes_.front();
        const uint8_t code = code_of(true, burst.index, burst.address);
        uint64_t strobe = 0;
        std::memcpy(&strobe, w_.strobe, kStrobeBytes);
        if (code == kOkay) store(memory_ + (burst.address - base_), static_cast<const uint8_t*>(w_.data), strobe);
        burst.code = std::max(burst.code, code);
        model_->write_beat_moved();
        ++beats_;
        burst.address += BYTES;
        --burst.left;
        if (bool(*w_.last) != (burst.left == 0))
            watch_.violation(name_, "wlast is %u on beat %u of a burst of %u", *w_.last, burst.beats - burst.left,
                             burst.beats);
        if (!burst.left) {
            burst.ready = model_->write_accepted(cycle, burst.address, burst.beats);
            responses_.push(burst);
            writes_.pop();
        }
    }

    void store(uint8_t* to, const uint8_t* from, uint64_t strobe) {
        stats.bytes_written += __builtin_popcountll(strobe);
        if (strobe == (BYTES == 64 ? ~uint64_t(0) : (uint64_t(1) << (BYTES % 64)) - 1)) {
            std::memcpy(to, from, BYTES);
            return;
        }
        for (; strobe; strobe &= strobe - 1) {
            const int lane = __builtin_ctzll(strobe);
            to[lane] = from[lane];
        }
    }

    static constexpr unsigned kStrobeBytes = (BYTES + 7) / 8;
    const char* name_;
    Watch& watch_;
    PortConfig config_;
    ReadSignals r_;
    WriteSignals w_;
    uint8_t* memory_;
    uint64_t size_, base_;
    std::unique_ptr<MemoryModel> model_;
    Random random_;
    Ring<Burst> reads_, writes_, responses_;
    Request ar_kept_{}, aw_kept_{};
    uint8_t w_data_[BYTES], w_strobe_[kStrobeBytes], w_last_ = 0;
    bool r_presented_ = false, b_presented_ = false, ar_held_ = false, aw_held_ = false, w_held_ = false;
    uint64_t beats_ = 0, read_index_ = 0, write_index_ = 0;
};

}  // namespace skipopu
