// Measures how fast memory can be read, for the benchmark to compare with.
#include "clock.h"
#include "dual_stream.h"

typedef uint64_t Words __attribute__((vector_size(64)));

extern "C" {

// Bytes per second that one thread reads from `size` bytes (a multiple of 512, aligned to 64), which should be more
// than the caches hold.
LM_ORTHO_API double lm_ortho_read_speed(const uint8_t* data, int64_t size) {
    Words even = {}, odd = {};  // as many as the registers of the narrowest processor hold
    const auto* words = reinterpret_cast<const Words*>(data);
    const double start = lm_ortho::thread_seconds();
    for (int64_t i = 0; i < size / 64; i += 8)
#pragma GCC unroll 4
        for (int j = 0; j < 8; j += 2) {
            even ^= words[i + j];
            odd ^= words[i + j + 1];
        }
    const double taken = lm_ortho::thread_seconds() - start;
    const Words all = even ^ odd;
    volatile uint64_t kept = all[0];
    (void)kept;
    return static_cast<double>(size) / taken;
}

}  // extern "C"
