// Timing of one HBM2 pseudo-channel behind an AXI port: data bus, banks with open rows, refresh, switch. Parameters and
// their sources stand in hbm.py, which fills HbmConfig. All times in picoseconds.
//
// A request is scheduled when it is accepted, access by access in the order of the port: the row is opened as early as
// the bank allows (so a stream hides it behind the accesses before), then the data bus is taken for one slot.
#pragma once
#include <deque>

#include "memory_model.h"

namespace skipopu {

struct HbmConfig {  // mirrored field by field in hbm.py
    uint64_t enabled, core, slot, path, column, activate, precharge, row_cycle, same_group, turnaround;
    uint64_t refresh_interval, refresh, phase, write_response;
};

class HbmMemory final : public MemoryModel {
public:
    static constexpr unsigned kAccess = 32;            // bytes: burst of four on 64 data lines
    static constexpr unsigned kBanks = 16, kBacklog = 64;  // write accesses waiting for the data bus

    HbmMemory(const HbmConfig& config, unsigned beat_bytes)
        : c_(config), beat_bytes_(beat_bytes), refresh_(config.phase) {}

    void tick(uint64_t cycle) override {
        const uint64_t now = cycle * c_.core;
        read_beat_allowed = !beats_.empty() && beats_.front() <= now;
        write_beat_allowed = bus_ <= now + kBacklog * c_.slot;
    }
    uint64_t read_accepted(uint64_t cycle, uint64_t address, unsigned beats) override {
        const size_t first = beats_.size();
        const uint64_t arrival = cycle * c_.core + c_.path;
        for (unsigned beat = 0; beat < beats; ++beat, address += beat_bytes_)
            beats_.push_back(transfer(arrival, address, beat_bytes_, false));
        return up(beats_[first]);
    }
    uint64_t write_accepted(uint64_t cycle, uint64_t address, unsigned beats) override {
        const uint64_t end = transfer(cycle * c_.core + c_.path, address, beats * beat_bytes_, true);
        return std::max(up(end), cycle + 1) + c_.write_response / c_.core;
    }
    void read_beat_moved() override { beats_.pop_front(); }
    void write_beat_moved() override {}

private:
    struct Bank {
        uint64_t row = ~uint64_t(0), idle = 0, opened = 0;
    };

    uint64_t up(uint64_t time) const { return (time + c_.core - 1) / c_.core; }

    // Moves all bytes; returns when the last of them has passed the bus.
    uint64_t transfer(uint64_t arrival, uint64_t address, unsigned bytes, bool write) {
        uint64_t end = arrival;
        for (unsigned done = 0; done < bytes; done += kAccess) end = access(arrival, address + done, write);
        return end;
    }

    uint64_t access(uint64_t arrival, uint64_t address, bool write) {
        // Row, bank group, bank, column, bank group: neighbours alternate between two groups (PG276's default, RGBCG).
        const uint64_t unit = address / kAccess;
        const unsigned group = (unit & 1) | (unit >> 8 & 1) << 1;
        const unsigned index = group | (unit >> 6 & 3) << 2;
        const uint64_t row = unit >> 9;
        Bank& bank = banks_[index];
        uint64_t earliest = std::max(arrival, bus_ + (write != writing_ ? c_.turnaround : 0));
        if (group == group_) earliest = std::max(earliest, bus_ + c_.same_group);
        uint64_t data;
        for (;;) {
            uint64_t open = arrival;
            if (bank.row != row) {
                open = std::max(arrival, bank.idle) + (bank.row == kClosed ? 0 : c_.precharge);
                open = std::max(open, bank.opened ? bank.opened + c_.row_cycle : 0);
                open = std::max(open, refreshed_);
                bank.opened = open;
                open += c_.activate;
            } else {
                open = std::max(open, bank.opened + c_.activate);
            }
            data = std::max(earliest, open + c_.column);
            if (data + c_.slot <= refresh_) break;
            // The refresh comes first: it closes every row.
            refreshed_ = std::max(refresh_, bus_) + c_.refresh;
            refresh_ += c_.refresh_interval;
            for (Bank& other : banks_) other.row = kClosed;
            bank.opened = 0;
        }
        bank.row = row;
        bank.idle = data + c_.slot - c_.column;
        bus_ = data + c_.slot;
        group_ = group, writing_ = write;
        return bus_;
    }

    static constexpr uint64_t kClosed = ~uint64_t(0);
    HbmConfig c_;
    unsigned beat_bytes_;
    Bank banks_[kBanks];
    std::deque<uint64_t> beats_;  // when each beat not yet delivered has passed the bus
    uint64_t bus_ = 0, refresh_, refreshed_ = 0;
    unsigned group_ = ~0u;
    bool writing_ = false;
};

}  // namespace skipopu
