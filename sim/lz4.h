// A small LZ4 block compressor for Verilator's FST writer, which includes <lz4.h> and needs the two functions below.
// With it a build with waveforms needs no LZ4 development package. Format: github.com/lz4/lz4, doc/lz4_Block_format.md.
#pragma once
#include <cstdint>
#include <cstring>
#include <vector>

namespace skipopu_lz4 {

inline uint8_t* put_length(uint8_t* out, size_t rest) {  // what the 4-bit field could not hold, 255 a byte
    for (; rest >= 255; rest -= 255) *out++ = 255;
    *out++ = uint8_t(rest);
    return out;
}

// One sequence: literals, then a copy of `match` bytes from `offset` back (match 0: the last sequence, literals only).
inline uint8_t* put_sequence(uint8_t* out, const uint8_t* literals, size_t count, size_t offset, size_t match) {
    const size_t extra = match ? match - 4 : 0;
    *out++ = uint8_t((count < 15 ? count : 15) << 4 | (extra < 15 ? extra : 15));
    if (count >= 15) out = put_length(out, count - 15);
    if (count) std::memcpy(out, literals, count);
    out += count;
    if (match) {
        *out++ = uint8_t(offset);
        *out++ = uint8_t(offset >> 8);
        if (extra >= 15) out = put_length(out, extra - 15);
    }
    return out;
}

}  // namespace skipopu_lz4

inline int LZ4_compressBound(int size) { return size + size / 255 + 16; }

// Greedy: the last position of each four-byte group is remembered in a table of 4096 hashes.
inline int LZ4_compress_default(const char* source, char* target, int size, int) {
    const auto* in = reinterpret_cast<const uint8_t*>(source);
    auto* out = reinterpret_cast<uint8_t*>(target);
    std::vector<int> seen(4096, -1);
    int literals = 0, at = 0;
    // The format keeps the last 5 bytes literal and lets no match begin in the last 12.
    while (at < size - 12) {
        uint32_t group;
        std::memcpy(&group, in + at, 4);
        int& slot = seen[group * 2654435761u >> 20];
        const int before = slot;
        slot = at;
        if (before < 0 || at - before > 65535 || std::memcmp(in + before, in + at, 4)) {
            ++at;
            continue;
        }
        int match = 4;
        while (at + match < size - 5 && in[before + match] == in[at + match]) ++match;
        out = skipopu_lz4::put_sequence(out, in + literals, at - literals, at - before, match);
        literals = at += match;
    }
    out = skipopu_lz4::put_sequence(out, in + literals, size - literals, 0, 0);
    return int(reinterpret_cast<char*>(out) - target);
}
