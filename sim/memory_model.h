// Timing of the memory behind one AXI port. The port (axi_port.h) does the protocol and the data; a MemoryModel only
// says when things may happen, so a bank and row model of a real memory is one more class beside IdealMemory.
#pragma once
#include <algorithm>
#include <cstdint>

namespace skipopu {

class MemoryModel {
public:
    virtual ~MemoryModel() = default;
    // Once per clock cycle, before the port moves anything: sets the two permissions below.
    virtual void tick(uint64_t cycle) = 0;
    // A read burst was accepted in `cycle`: the earliest cycle of its first beat.
    virtual uint64_t read_accepted(uint64_t cycle, uint64_t address, unsigned beats) = 0;
    // The last beat of a write burst arrived in `cycle`: the earliest cycle of its response.
    virtual uint64_t write_accepted(uint64_t cycle, uint64_t address, unsigned beats) = 0;
    virtual void read_beat_moved() = 0;
    virtual void write_beat_moved() = 0;

    bool read_beat_allowed = true, write_beat_allowed = true;
};

// Fixed latency, and a bandwidth of at most one beat per cycle in each direction, kept as credit in 1/2^32 beats.
class IdealMemory final : public MemoryModel {
public:
    static constexpr uint64_t kBeat = uint64_t(1) << 32;
    IdealMemory(uint64_t read_latency, uint64_t write_latency, uint64_t rate)
        : read_latency_(read_latency), write_latency_(write_latency), rate_(rate) {}

    void tick(uint64_t) override {
        // The cap keeps the fraction left over by a beat but lets an idle port save up no more than one beat.
        read_credit_ = std::min(read_credit_ + rate_, kBeat + rate_ - 1);
        write_credit_ = std::min(write_credit_ + rate_, kBeat + rate_ - 1);
        read_beat_allowed = read_credit_ >= kBeat;
        write_beat_allowed = write_credit_ >= kBeat;
    }
    uint64_t read_accepted(uint64_t cycle, uint64_t, unsigned) override { return cycle + read_latency_; }
    uint64_t write_accepted(uint64_t cycle, uint64_t, unsigned) override { return cycle + write_latency_; }
    void read_beat_moved() override { read_credit_ -= kBeat; }
    void write_beat_moved() override { write_credit_ -= kBeat; }

private:
    uint64_t read_latency_, write_latency_, rate_;
    uint64_t read_credit_ = 0, write_credit_ = 0;
};

}  // namespace skipopu
