// Who of the SLEEPERS has a clock in a cycle: not 0 for those that have.
#pragma once
#include <cstdint>

namespace skipopu {

#define SLEEPER(part) uint8_t part = 0;
struct Awake {
    SLEEPERS
#undef SLEEPER
#define SLEEPER(part) part |= other.part;
    Awake& operator|=([[maybe_unused]] const Awake& other) {
        SLEEPERS
        return *this;
    }
#undef SLEEPER
};

}  // namespace skipopu
