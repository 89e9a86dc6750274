// AVX-512 with BF16 pair products (Zen 4, Sapphire Rapids and later).
//
// Every output is one chain of pair products per group of columns, then one multiply-add with the scale; then one
// chain per lane of a sheet. Nothing in that order depends on how many rows x has, so a row of x gets the same bits
// in any batch.
#include "dual_stream.h"

#include <immintrin.h>

#include <algorithm>
#include <cstring>

namespace lm_ortho {
namespace {

constexpr int BLOCKS = PANEL / BLOCK;
constexpr int MOST = 6;  // rows of x at once: 6 * 4 sums, 4 words, a table and a broadcast fill the 32 registers

// Nibble -> BF16, twice over: vpermw reads five bits and only four are the code.
__m512i table(int plane, int planes) {
    alignas(64) uint16_t entries[32];
    for (int i = 0; i < 32; ++i) {
        const int nibble = i & 15;
        const float value = planes == 1 ? nibble - 8 : plane == 0 ? 16 * (nibble - 8) : nibble;
        entries[i] = narrow(value);
    }
    return _mm512_load_si512(entries);
}

inline __m512 wide16(const uint16_t* bf16) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bf16))), 16));
}

inline __m512bh pairs(uint32_t two) { return (__m512bh)_mm512_set1_epi32(static_cast<int>(two)); }

template <int J> inline __m512bh decode(__m512i word, __m512i codes) {
    return (__m512bh)_mm512_permutexvar_epi16(J == 0 ? word : _mm512_srli_epi32(word, 4 * J), codes);
}

struct Base {
    int64_t groups, group, group_bytes;
    int planes;
    __m512i tables[2];
    explicit Base(const Job& job)
        : groups(job.groups), group(job.group), group_bytes(job.group_bytes()), planes(job.planes),
          tables{table(0, job.planes), table(1, job.planes)} {}
};

// One chunk of 8 columns: x has their 4 pairs, T rows side by side.
template <int T, int B, int J>
inline void pair_step(const __m512i* words, __m512i codes, const uint32_t* x, __m512 (&sums)[T][B]) {
    __m512bh weights[B];
    for (int b = 0; b < B; ++b) weights[b] = decode<J>(words[b], codes);
    for (int t = 0; t < T; ++t) {
        const __m512bh two = pairs(x[J * T + t]);
        for (int b = 0; b < B; ++b) sums[t][b] = _mm512_dpbf16_ps(sums[t][b], weights[b], two);
    }
}

// total (T, PANEL * P) = the base products of T rows with P panels.
template <int T, int P> void base_product(const Base& base, const uint8_t* const* panels, const uint32_t* x, float* total) {
    constexpr int B = P * BLOCKS;
    __m512 totals[T][B];
    if constexpr (T == 1)
        for (int b = 0; b < B; ++b) totals[0][b] = _mm512_setzero_ps();
    else
        std::memset(total, 0, sizeof(float) * T * PANEL * P);
    for (int64_t g = 0; g < base.groups; ++g) {
        __m512 sums[T][B];
        for (int t = 0; t < T; ++t)
            for (int b = 0; b < B; ++b) sums[t][b] = _mm512_setzero_ps();
        for (int plane = 0; plane < base.planes; ++plane) {
            const __m512i codes = base.tables[plane];
            const int64_t chunks = base.group / CHUNK;
            const int64_t offset = g * base.group_bytes + 2 * PANEL + plane * chunks * CHUNK_BYTES;
            const uint32_t* xg = x + g * (base.group / 2) * T;
            for (int64_t c = 0; c < chunks; ++c) {
                __m512i words[B];
                for (int b = 0; b < B; ++b) {
                    const uint8_t* at = panels[b / BLOCKS] + offset + c * CHUNK_BYTES + (b % BLOCKS) * 64;
                    words[b] = _mm512_load_si512(at);
                    _mm_prefetch(reinterpret_cast<const char*>(at) + 4096, _MM_HINT_T0);
                }
                pair_step<T, B, 0>(words, codes, xg + c * 4 * T, sums);
                pair_step<T, B, 1>(words, codes, xg + c * 4 * T, sums);
                pair_step<T, B, 2>(words, codes, xg + c * 4 * T, sums);
                pair_step<T, B, 3>(words, codes, xg + c * 4 * T, sums);
            }
        }
        for (int b = 0; b < B; ++b) {
            const auto* scales = reinterpret_cast<const uint16_t*>(panels[b / BLOCKS] + g * base.group_bytes);
            const __m512 scale = wide16(scales + (b % BLOCKS) * BLOCK);
            for (int t = 0; t < T; ++t) {
                if constexpr (T == 1) {
                    totals[t][b] = _mm512_fmadd_ps(sums[t][b], scale, totals[t][b]);
                } else {
                    float* at = total + t * PANEL * P + b * BLOCK;
                    _mm512_store_ps(at, _mm512_fmadd_ps(sums[t][b], scale, _mm512_load_ps(at)));
                }
            }
        }
    }
    if constexpr (T == 1)
        for (int b = 0; b < B; ++b) _mm512_store_ps(total + b * BLOCK, totals[0][b]);
}

// sums (T, LANES): the products of T rows of x with one group of lanes.
template <int T>
inline void lane_products(const Sheets& sheets, uint32_t group, const uint16_t* x, int64_t stride, __m512 (&sums)[T]) {
    for (int t = 0; t < T; ++t) sums[t] = _mm512_setzero_ps();
    const __m512i bit6 = _mm512_set1_epi16(64), bit7 = _mm512_set1_epi16(128);
    const uint32_t end = sheets.group_steps[group + 1];
    for (uint32_t s = sheets.group_steps[group]; s < end; ++s) {
        const uint8_t* step = sheets.steps + static_cast<size_t>(s) * STEP_BYTES;
        const __m512i at = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(step)));
        const auto values = (__m512bh)_mm512_loadu_si512(step + SLOTS);
        const __mmask32 high = _mm512_test_epi16_mask(at, bit7), middle = _mm512_test_epi16_mask(at, bit6);
        for (int t = 0; t < T; ++t) {
            const auto* w = reinterpret_cast<const __m512i*>(x + t * stride + sheets.step_bases[s]);
            const __m512i a = _mm512_permutex2var_epi16(w[0], at, w[1]), b = _mm512_permutex2var_epi16(w[2], at, w[3]);
            const __m512i c = _mm512_permutex2var_epi16(w[4], at, w[5]), d = _mm512_permutex2var_epi16(w[6], at, w[7]);
            const __m512i low_half = _mm512_mask_blend_epi16(middle, a, b), high_half = _mm512_mask_blend_epi16(middle, c, d);
            sums[t] = _mm512_dpbf16_ps(sums[t], (__m512bh)_mm512_mask_blend_epi16(high, low_half, high_half), values);
        }
    }
}

// product (T, PANEL + 1): the products of T rows of x with one panel of an ortho stream; the last column is rubbish.
constexpr int SPARE = PANEL + BLOCK;
template <int T>
void sheet_product(const Sheets& sheets, int64_t panel, const uint16_t* x, int64_t stride, float* product) {
    std::memset(product, 0, sizeof(float) * T * SPARE);
    for (uint32_t g = sheets.panel_groups[panel]; g < sheets.panel_groups[panel + 1]; ++g) {
        __m512 sums[T];
        lane_products<T>(sheets, g, x, stride, sums);
        const uint8_t* rows = sheets.lane_rows + static_cast<size_t>(g) * LANES;
        for (int t = 0; t < T; ++t) {
            alignas(64) float lanes[LANES];
            _mm512_store_ps(lanes, sums[t]);
            for (int lane = 0; lane < LANES; ++lane) product[t * SPARE + rows[lane]] += lanes[lane];
        }
    }
}

template <int T> struct Rows {
    static void base(const Base& b, const uint8_t* const* panels, const uint32_t* x, float* total) {
        base_product<T, 1>(b, panels, x, total);
    }
    static void sheet(const Sheets& s, int64_t panel, const uint16_t* x, int64_t stride, float* product) {
        sheet_product<T>(s, panel, x, stride, product);
    }
};

// Calls Rows<T>::base or ::sheet for a number of rows known at run time.
#define BY_ROWS(count, what, ...)                   \
    switch (count) {                                \
        case 1: Rows<1>::what(__VA_ARGS__); break;  \
        case 2: Rows<2>::what(__VA_ARGS__); break;  \
        case 3: Rows<3>::what(__VA_ARGS__); break;  \
        case 4: Rows<4>::what(__VA_ARGS__); break;  \
        case 5: Rows<5>::what(__VA_ARGS__); break;  \
        default: Rows<6>::what(__VA_ARGS__); break; \
    }

// x as the kernels read it: rows padded with zeros, and for tiles of several rows the pairs side by side.
struct Input {
    int64_t rows, width, stride, tile_count;
    Buffer padded, packed;

    explicit Input(const Job& job)
        : rows(job.rows), width(job.width()), stride((width + WINDOW + 31) / 32 * 32),
          tile_count((rows + MOST - 1) / MOST), padded(2 * rows * stride), packed(rows > 1 ? 2 * rows * width : 0) {
        for (int64_t m = 0; m < rows; ++m) {
            std::memcpy(row(m), job.x + m * job.in_features, 2 * job.in_features);
            std::memset(row(m) + job.in_features, 0, 2 * (stride - job.in_features));
        }
        if (rows > 1)
            for (int64_t i = 0; i < tile_count; ++i) pack(first(i), first(i + 1) - first(i));
    }
    uint16_t* row(int64_t m) const { return padded.as<uint16_t>() + m * stride; }
    // Tiles differ in size by one row at most.
    int64_t first(int64_t tile) const { return rows * tile / tile_count; }
    uint32_t* tile(int64_t from) const {
        return rows > 1 ? packed.as<uint32_t>() + from * (width / 2) : reinterpret_cast<uint32_t*>(row(0));
    }
    void pack(int64_t from, int64_t count) {
        uint32_t* out = tile(from);
        for (int64_t m = 0; m < count; ++m) {
            const auto* pair = reinterpret_cast<const uint32_t*>(row(from + m));
            for (int64_t k = 0; k < width / 2; ++k) out[k * count + m] = pair[k];
        }
    }
};

inline void store(const Job& job, int64_t row, int64_t column, __m512 sums, __mmask16 there) {
    const int64_t at = row * job.out_features + column;
    if (job.bias) sums = _mm512_add_ps(sums, _mm512_maskz_loadu_ps(there, job.bias + column));
    if (job.y_float)
        _mm512_mask_storeu_ps(static_cast<float*>(job.y) + at, there, sums);
    else
        _mm256_mask_storeu_epi16(static_cast<uint16_t*>(job.y) + at, there, (__m256i)_mm512_cvtneps_pbh(sums));
}

// y of one row and one panel from the base product and, where alpha is not 0, the sparse ones.
void finish(const Job& job, int64_t row, int64_t panel, const float* total, const float* products, int64_t between) {
    for (int b = 0; b < BLOCKS; ++b) {
        const int64_t column = panel * PANEL + b * BLOCK, left = job.out_features - column;
        if (left <= 0) return;
        __m512 sums = _mm512_load_ps(total + b * BLOCK);
        for (int t = 0; t < job.n_terms; ++t) {
            const float alpha = job.terms[t].of_row(row);
            if (alpha != 0.0f)
                sums = _mm512_fmadd_ps(_mm512_set1_ps(alpha), _mm512_load_ps(products + t * between + b * BLOCK), sums);
        }
        store(job, row, column, sums, left >= BLOCK ? 0xffff : static_cast<__mmask16>((1u << left) - 1));
    }
}

struct Small {
    const Job& job;
    const Input& input;

    // One tile of rows against P neighbouring panels.
    template <int P> void tile(const Base& base, int64_t panel, int64_t from, int64_t count, float* total, float* products) const {
        const uint8_t* panels[P];
        for (int p = 0; p < P; ++p) panels[p] = job.panel(panel + p);
        if constexpr (P == 1) {
            BY_ROWS(count, base, base, panels, input.tile(from), total)
        } else {
            base_product<1, P>(base, panels, input.tile(from), total);
        }
        for (int p = 0; p < P; ++p) {
            for (int t = 0; t < job.n_terms; ++t)
                if (job.terms[t].active(from, count)) {
                    float* product = products + t * MOST * SPARE;
                    BY_ROWS(count, sheet, job.terms[t].sheets, panel + p, input.row(from), input.stride, product)
                }
            for (int64_t m = 0; m < count; ++m)
                finish(job, from + m, panel + p, total + (m * P + p) * PANEL, products + m * SPARE, MOST * SPARE);
        }
    }
};

void small_worker(void* context, int worker, int workers) {
    const auto& small = *static_cast<const Small*>(context);
    const Job& job = small.job;
    const Base base(job);
    const Buffer total(sizeof(float) * MOST * PANEL * 2), products(sizeof(float) * MOST * SPARE * std::max(1, job.n_terms));
    const int64_t units = (job.panels() + 1) / 2, end = std::min(job.panels(), 2 * (units * (worker + 1) / workers));
    for (int64_t panel = 2 * (units * worker / workers); panel < end;) {
        const bool two = job.rows == 1 && panel + 1 < end;
        for (int64_t i = 0; i < small.input.tile_count; ++i) {
            const int64_t from = small.input.first(i), count = small.input.first(i + 1) - from;
            if (two)
                small.tile<2>(base, panel, from, count, total.as<float>(), products.as<float>());
            else
                small.tile<1>(base, panel, from, count, total.as<float>(), products.as<float>());
        }
        panel += two ? 2 : 1;
    }
}

}  // namespace

void run_avx512(const Job& job) {
    const Input input(job);
    Small small{job, input};
    parallel(job.threads, small_worker, &small);
}

}  // namespace lm_ortho
