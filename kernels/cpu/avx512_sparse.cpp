// AVX-512 with BF16 pair products: the sparse products, for few rows of x and for many. Both add the same pairs in the
// same order.
#include "avx512.h"

namespace lm_ortho {
namespace avx512 {
namespace {

constexpr int64_t AHEAD = 3072;  // bytes of steps that are fetched in advance: 32 steps

inline void prefetch_step(const uint8_t* step) {
    _mm_prefetch(reinterpret_cast<const char*>(step) + AHEAD, _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(step) + AHEAD + 64, _MM_HINT_T0);
}

// sums (T): T rows of x with one group of lanes.
template <int T>
inline void lane_sums(const Sheets& sheets, uint32_t group, const uint16_t* x, int64_t stride, __m512 (&sums)[T]) {
    for (int t = 0; t < T; ++t) sums[t] = _mm512_setzero_ps();
    const __m512i bit6 = _mm512_set1_epi16(64), bit7 = _mm512_set1_epi16(128);
    for (uint32_t s = sheets.group_steps[group]; s < sheets.group_steps[group + 1]; ++s) {
        const uint8_t* step = sheets.steps + static_cast<size_t>(s) * STEP_BYTES;
        prefetch_step(step);
        const __m512i at = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(step)));
        const auto values = (__m512bh)_mm512_loadu_si512(step + SLOTS);
        const __mmask32 high = _mm512_test_epi16_mask(at, bit7), middle = _mm512_test_epi16_mask(at, bit6);
        for (int t = 0; t < T; ++t) {
            // 256 values of x in eight vectors: four look-ups of 64, then the two high bits choose among them.
            const auto* w = reinterpret_cast<const __m512i*>(x + t * stride + sheets.step_bases[s]);
            const __m512i a = _mm512_permutex2var_epi16(w[0], at, w[1]), b = _mm512_permutex2var_epi16(w[2], at, w[3]);
            const __m512i c = _mm512_permutex2var_epi16(w[4], at, w[5]), d = _mm512_permutex2var_epi16(w[6], at, w[7]);
            const __m512i ab = _mm512_mask_blend_epi16(middle, a, b), cd = _mm512_mask_blend_epi16(middle, c, d);
            sums[t] = _mm512_dpbf16_ps(sums[t], (__m512bh)_mm512_mask_blend_epi16(high, ab, cd), values);
        }
    }
}

template <int T>
void sheet_rows(const Sheets& sheets, int64_t panel, const uint16_t* x, int64_t stride, float* product) {
    std::memset(product, 0, sizeof(float) * T * SPARE);
    for (uint32_t g = sheets.panel_groups[panel]; g < sheets.panel_groups[panel + 1]; ++g) {
        __m512 sums[T];
        lane_sums<T>(sheets, g, x, stride, sums);
        const uint8_t* rows = sheets.lane_rows + static_cast<size_t>(g) * LANES;
        for (int t = 0; t < T; ++t) {
            alignas(64) float lanes[LANES];
            _mm512_store_ps(lanes, sums[t]);
            for (int lane = 0; lane < LANES; ++lane) product[t * SPARE + rows[lane]] += lanes[lane];
        }
    }
}

// Transposes sixteen rows of sixteen 32-bit values.
void transpose(__m512i (&r)[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        const __m512i a = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88), b = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        const __m512i c = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd), d = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
        t[i] = _mm512_shuffle_i32x4(a, b, 0x88);
        t[i + 8] = _mm512_shuffle_i32x4(a, b, 0xdd);
        t[i + 4] = _mm512_shuffle_i32x4(c, d, 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(c, d, 0xdd);
    }
    for (int i = 0; i < 16; ++i) r[i] = t[i];
}


// Indices of the 16-bit values of (16 of a, 16 of b) that form a pair each.
inline __m512i interleave() {
    alignas(64) uint16_t at[32];
    for (int i = 0; i < 32; ++i) at[i] = static_cast<uint16_t>(i / 2 + 16 * (i % 2));
    return _mm512_load_si512(at);
}

// Loops over lanes are unrolled below, or the compiler would keep the sums in memory. Distances are read eight at a time:
// a load for each of them would take as long as the loads of x.

// rows (SPARE, 16) += one group of lanes with 16 rows of x, whose columns are 32 bytes each.
void lanes_of_16(const Sheets& sheets, uint32_t group, const uint16_t* x, float* rows) {
    const __m512i order = interleave();
    __m512 sums[LANES];
#pragma GCC unroll 16
    for (int lane = 0; lane < LANES; ++lane) sums[lane] = _mm512_setzero_ps();
    for (uint32_t s = sheets.group_steps[group]; s < sheets.group_steps[group + 1]; ++s) {
        const uint8_t* step = sheets.steps + static_cast<size_t>(s) * STEP_BYTES;
        const auto* window = reinterpret_cast<const __m256i*>(x) + sheets.step_bases[s];
        prefetch_step(step);
        uint64_t distances = 0;
#pragma GCC unroll 16
        for (int lane = 0; lane < LANES; ++lane) {
            if (lane % 4 == 0) __builtin_memcpy(&distances, step + 2 * lane, 8);
            const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(window[distances & 255]),
                                                    window[distances >> 8 & 255], 1);
            distances >>= 16;
            const __m512bh values = pair_of(reinterpret_cast<const uint16_t*>(step + SLOTS), lane);
            sums[lane] = _mm512_dpbf16_ps(sums[lane], (__m512bh)_mm512_permutexvar_epi16(order, both), values);
        }
    }
    const uint8_t* own = sheets.lane_rows + static_cast<size_t>(group) * LANES;
#pragma GCC unroll 16
    for (int lane = 0; lane < LANES; ++lane) {
        float* row = rows + own[lane] * 16;
        _mm512_store_ps(row, _mm512_add_ps(_mm512_load_ps(row), sums[lane]));
    }
}

constexpr int ABREAST = 8;  // lanes of a sheet with 32 rows of x at once: 16 sums

// rows (SPARE, 32) += eight lanes of one group with 32 rows of x, whose columns are 64 bytes each.
template <int FIRST> void lanes_of_32(const Sheets& sheets, uint32_t group, const uint16_t* x, float* rows) {
    __m512 sums[ABREAST][2];
#pragma GCC unroll 8
    for (int lane = 0; lane < ABREAST; ++lane) sums[lane][0] = sums[lane][1] = _mm512_setzero_ps();
    for (uint32_t s = sheets.group_steps[group]; s < sheets.group_steps[group + 1]; ++s) {
        const uint8_t* step = sheets.steps + static_cast<size_t>(s) * STEP_BYTES;
        const auto* window = reinterpret_cast<const __m512i*>(x) + sheets.step_bases[s];
        prefetch_step(step);
        uint64_t distances = 0;
#pragma GCC unroll 8
        for (int lane = 0; lane < ABREAST; ++lane) {
            if (lane % 4 == 0) __builtin_memcpy(&distances, step + 2 * (FIRST + lane), 8);
            const __m512i a = window[distances & 255], b = window[distances >> 8 & 255];
            distances >>= 16;
            const __m512bh values = pair_of(reinterpret_cast<const uint16_t*>(step + SLOTS), FIRST + lane);
            sums[lane][0] = _mm512_dpbf16_ps(sums[lane][0], (__m512bh)_mm512_unpacklo_epi16(a, b), values);
            sums[lane][1] = _mm512_dpbf16_ps(sums[lane][1], (__m512bh)_mm512_unpackhi_epi16(a, b), values);
        }
    }
    const uint8_t* own = sheets.lane_rows + static_cast<size_t>(group) * LANES + FIRST;
#pragma GCC unroll 8
    for (int lane = 0; lane < ABREAST; ++lane) {
        float* row = rows + own[lane] * 32;
        _mm512_store_ps(row, _mm512_add_ps(_mm512_load_ps(row), sums[lane][0]));
        _mm512_store_ps(row + 16, _mm512_add_ps(_mm512_load_ps(row + 16), sums[lane][1]));
    }
}

// The 16-bit halves of 16 pairs: the first or the second column of each.
inline __m256i column_of(__m512i pairs, int second) {
    return _mm512_cvtepi32_epi16(second ? _mm512_srli_epi32(pairs, 16) : pairs);
}

}  // namespace

void sheet_by_rows(const Sheets& sheets, int64_t panel, const Rows& x, int64_t from, int64_t count, float* product) {
    constexpr int64_t AT_ONCE = 6;
    for (int64_t m = 0; m < count; m += AT_ONCE, product += AT_ONCE * SPARE)
        switch (std::min(AT_ONCE, count - m)) {
            case 1: sheet_rows<1>(sheets, panel, x.row(from + m), x.stride, product); break;
            case 2: sheet_rows<2>(sheets, panel, x.row(from + m), x.stride, product); break;
            case 3: sheet_rows<3>(sheets, panel, x.row(from + m), x.stride, product); break;
            case 4: sheet_rows<4>(sheets, panel, x.row(from + m), x.stride, product); break;
            case 5: sheet_rows<5>(sheets, panel, x.row(from + m), x.stride, product); break;
            default: sheet_rows<6>(sheets, panel, x.row(from + m), x.stride, product); break;
        }
}

void Columns::fill(const Rows& x, int64_t from, int64_t count) {
    count_ = count;
    // With 32 rows the order that interleaving two columns puts right: four of the first 16, four of the others.
    const __m512i quarters = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
    for (int64_t k = 0; k < stride_; k += 32) {
        __m512i low[16], high[16];
        for (int i = 0; i < 16; ++i) {
            low[i] = i < count ? _mm512_loadu_si512(x.row(from + i) + k) : _mm512_setzero_si512();
            high[i] = i + 16 < count ? _mm512_loadu_si512(x.row(from + i + 16) + k) : _mm512_setzero_si512();
        }
        transpose(low);
        if (count > 16) transpose(high);
        for (int pair = 0; pair < 16; ++pair)
            for (int second = 0; second < 2; ++second) {
                const int64_t column = k + 2 * pair + second;
                const __m256i first = column_of(low[pair], second);
                if (count <= 16)
                    _mm256_store_si256(data_.as<__m256i>() + column, first);
                else
                    _mm512_store_si512(data_.as<__m512i>() + column,
                                       _mm512_permutex2var_epi64(_mm512_castsi256_si512(first), quarters,
                                                                 _mm512_castsi256_si512(column_of(high[pair], second))));
            }
    }
}

void Columns::sheet(const Sheets& sheets, int64_t panel, float* product) const {
    const int64_t width = count_ <= 16 ? 16 : 32;
    alignas(64) float rows[SPARE * TOKENS];
    std::memset(rows, 0, sizeof(float) * SPARE * width);
    for (uint32_t g = sheets.panel_groups[panel]; g < sheets.panel_groups[panel + 1]; ++g) {
        if (width == 16) {
            lanes_of_16(sheets, g, data_.as<uint16_t>(), rows);
        } else {
            lanes_of_32<0>(sheets, g, data_.as<uint16_t>(), rows);
            lanes_of_32<ABREAST>(sheets, g, data_.as<uint16_t>(), rows);
        }
    }
    for (int64_t first = 0; first < width; first += 16)
        for (int b = 0; b < BLOCKS; ++b) {
            __m512i square[16];
            for (int r = 0; r < 16; ++r) square[r] = _mm512_load_si512(rows + (b * BLOCK + r) * width + first);
            transpose(square);
            for (int t = 0; t < 16; ++t) _mm512_store_si512(product + (first + t) * SPARE + b * BLOCK, square[t]);
        }
}

}  // namespace avx512
}  // namespace lm_ortho
