// Measures the speed of BF16 pair products, for the benchmark to compare with.
#include "clock.h"
#include "dual_stream.h"

#include <immintrin.h>

extern "C" {

// Multiply-adds of BF16 values per second that one thread does in registers.
LM_ORTHO_API double lm_ortho_product_speed() {
    constexpr int CHAINS = 16, TURNS = 2000000;
    __m512 sums[CHAINS];
#pragma GCC unroll 16
    for (int i = 0; i < CHAINS; ++i) sums[i] = _mm512_setzero_ps();
    volatile int one = 0x3f803f80;
    const auto pair = (__m512bh)_mm512_set1_epi32(one);
    const double start = lm_ortho::thread_seconds();
    for (int turn = 0; turn < TURNS; ++turn) {
#pragma GCC unroll 16
        for (int i = 0; i < CHAINS; ++i) {
            sums[i] = _mm512_dpbf16_ps(sums[i], pair, pair);
            asm volatile("" : "+v"(sums[i]));
        }
    }
    const double taken = lm_ortho::thread_seconds() - start;
    float all = 0;
#pragma GCC unroll 16
    for (int i = 0; i < CHAINS; ++i) all += _mm512_reduce_add_ps(sums[i]);
    volatile float kept = all;
    (void)kept;
    return 32.0 * CHAINS * TURNS / taken;
}

}  // extern "C"
