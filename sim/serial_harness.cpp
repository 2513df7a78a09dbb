// Simulation of a board with a serial line: the Verilated design and the two ends of its UART, behind a C interface for
// ctypes. Bytes go in and come out; on the pins they are bits of `divisor` clocks.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <deque>
#include <memory>
#include <stdexcept>
#include <string>

#include "Vtop.h"
#include "verilated.h"

#define API extern "C" __attribute__((visibility("default")))

// Verilator's default ends the process; an exception reaches the caller as an error.
void vl_fatal(const char* file, int line, const char*, const char* message) {
    throw std::runtime_error(std::string("design: ") + file + ":" + std::to_string(line) + ": " + message);
}

namespace skipopu {

class Board {
public:
    explicit Board(unsigned divisor) : divisor_(divisor) {
        top_ = std::make_unique<Vtop>(&context_);
        power_up(4);
    }
    ~Board() { top_->final(); }

    // As after loading the bitstream: registers at their defaults; what was on the line is lost.
    void power_up(unsigned cycles) {
        top_->rst = 1;
        top_->rx = 1;
        send_left_ = receive_left_ = send_timer_ = 0;
        to_board_.clear();
        while (cycles--) clock();
        top_->rst = 0;
    }

    // Until `wanted` bytes have come from the board, at most `cycles`.
    void run(uint64_t cycles, size_t wanted) {
        while (cycles-- && from_board_.size() < wanted) {
            drive();
            clock();
            sample();
        }
    }

    void send(const uint8_t* data, size_t size) { to_board_.insert(to_board_.end(), data, data + size); }
    size_t take(uint8_t* out, size_t most) {
        const size_t count = std::min(most, from_board_.size());
        std::copy_n(from_board_.begin(), count, out);
        from_board_.erase(from_board_.begin(), from_board_.begin() + count);
        return count;
    }
    size_t waiting() const { return from_board_.size(); }
    uint64_t now() const { return cycle_; }
    unsigned lights() const { return top_->running | top_->fault << 1 | top_->active << 2; }

private:
    void clock() {
        top_->clk = 1;
        top_->eval();
        top_->clk = 0;
        top_->eval();
        ++cycle_;
    }

    void drive() {
        if (send_timer_) {
            --send_timer_;
            return;
        }
        if (!send_left_ && !to_board_.empty()) {
            send_bits_ = 0x200u | to_board_.front() << 1;  // start bit, data from the lowest bit on, stop bit
            to_board_.pop_front();
            send_left_ = 10;
        }
        if (!send_left_) return;
        top_->rx = send_bits_ & 1;
        send_bits_ >>= 1;
        --send_left_;
        send_timer_ = divisor_ - 1;
    }

    void sample() {
        if (!receive_left_) {
            if (!top_->tx) receive_left_ = 9, receive_timer_ = divisor_ + divisor_ / 2;
        } else if (--receive_timer_ == 0) {
            receive_timer_ = divisor_;
            if (--receive_left_) {
                received_ = uint8_t(received_ >> 1 | top_->tx << 7);
            } else if (top_->tx) {
                from_board_.push_back(received_);
            }
        }
    }

    const unsigned divisor_;
    VerilatedContext context_;
    std::unique_ptr<Vtop> top_;
    std::deque<uint8_t> to_board_, from_board_;
    unsigned send_bits_ = 0, send_left_ = 0, send_timer_ = 0, receive_left_ = 0, receive_timer_ = 0;
    uint8_t received_ = 0;
    uint64_t cycle_ = 0;
};

}  // namespace skipopu

using skipopu::Board;

API Board* board_new(unsigned divisor) {
    try {
        return new Board(divisor);
    } catch (const std::exception& e) {
        fprintf(stderr, "%s\n", e.what());
        return nullptr;
    }
}
API void board_delete(Board* b) { delete b; }
API void board_power_up(Board* b) { b->power_up(4); }
API void board_send(Board* b, const uint8_t* data, size_t size) { b->send(data, size); }
// No exception may pass the C boundary; 0 when the design has stopped itself.
API int board_run(Board* b, uint64_t cycles, size_t wanted) {
    try {
        return b->run(cycles, wanted), 1;
    } catch (const std::exception& e) {
        fprintf(stderr, "%s\n", e.what());
        return 0;
    }
}
API size_t board_take(Board* b, uint8_t* out, size_t most) { return b->take(out, most); }
API size_t board_waiting(const Board* b) { return b->waiting(); }
API uint64_t board_cycle(const Board* b) { return b->now(); }
API unsigned board_lights(const Board* b) { return b->lights(); }
