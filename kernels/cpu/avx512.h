// Declarations that the AVX-512 files share. Every output is one chain of BF16 pair products per group of columns, one multiply-add
// with the scale per group, and one chain per lane of a sheet. Nothing in that order depends on how many rows x has
// or which function runs, so a row of x gets the same bits in any batch.
#pragma once
#include "dual_stream.h"

#include <immintrin.h>

#include <algorithm>
#include <cstring>

namespace lm_ortho {
namespace avx512 {

constexpr int BLOCKS = PANEL / BLOCK;
constexpr int SPARE = PANEL + BLOCK;  // a row of sparse products: lanes without a row write behind the panel

inline __m512 wide16(const uint16_t* bf16) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bf16))), 16));
}

// The pair of values at column 2 * pair of a row of x, in every lane.
inline __m512bh pair_of(const uint16_t* row, int64_t pair) {
    int32_t two;
    __builtin_memcpy(&two, row + 2 * pair, 4);
    return (__m512bh)_mm512_set1_epi32(two);
}

// Nibble -> BF16, twice over: vpermw reads five bits and only four are the code.
inline __m512i table(int plane, int planes) {
    alignas(64) uint16_t entries[32];
    for (int i = 0; i < 32; ++i) {
        const int nibble = i & 15;
        entries[i] = narrow(planes == 1 ? nibble - 8 : plane == 0 ? 16 * (nibble - 8) : nibble);
    }
    return _mm512_load_si512(entries);
}

template <int J> inline __m512i decode(__m512i word, __m512i codes) {
    return _mm512_permutexvar_epi16(J == 0 ? word : _mm512_srli_epi32(word, 4 * J), codes);
}

// The numbers of a job that inner loops need, and its tables.
struct Base {
    int64_t groups, group, group_bytes, chunks, stride;
    int planes;
    __m512i tables[2];
    Base(const Job& job, int64_t x_stride)
        : groups(job.groups), group(job.group), group_bytes(job.group_bytes()), chunks(job.group / CHUNK),
          stride(x_stride), planes(job.planes), tables{table(0, job.planes), table(1, job.planes)} {}
};

// Rows of x padded with zeros. An odd number of cache lines apart, so that they do not fall into one set of the cache.
struct Rows {
    int64_t stride;
    Buffer data;

    explicit Rows(const Job& job)
        : stride(((job.width() + WINDOW + 31) / 32 | 1) * 32), data(2 * job.rows * stride) {
        for (int64_t m = 0; m < job.rows; ++m) {
            std::memcpy(row(m), job.x + m * job.in_features, 2 * job.in_features);
            std::memset(row(m) + job.in_features, 0, 2 * (stride - job.in_features));
        }
    }
    uint16_t* row(int64_t m) const { return data.as<uint16_t>() + m * stride; }
};

// y of one row and one panel: base product, sparse products where alpha is not 0, bias; rounded once.
inline void finish(const Job& job, int64_t row, int64_t panel, const float* total, const float* products,
                   int64_t between) {
    for (int b = 0; b < BLOCKS; ++b) {
        const int64_t column = panel * PANEL + b * BLOCK, left = job.out_features - column;
        if (left <= 0) return;
        const __mmask16 there = left >= BLOCK ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
        __m512 sums = _mm512_load_ps(total + b * BLOCK);
        for (int t = 0; t < job.n_terms; ++t) {
            const float alpha = job.terms[t].of_row(row);
            if (alpha != 0.0f)
                sums = _mm512_fmadd_ps(_mm512_set1_ps(alpha), _mm512_load_ps(products + t * between + b * BLOCK), sums);
        }
        if (job.bias) sums = _mm512_add_ps(sums, _mm512_maskz_loadu_ps(there, job.bias + column));
        const int64_t at = row * job.out_features + column;
        if (job.y_float)
            _mm512_mask_storeu_ps(static_cast<float*>(job.y) + at, there, sums);
        else
            _mm256_mask_storeu_epi16(static_cast<uint16_t*>(job.y) + at, there, (__m256i)_mm512_cvtneps_pbh(sums));
    }
}

// product (count, SPARE): rows of x with one panel of an ortho stream, looked up in the rows themselves.
void sheet_by_rows(const Sheets& sheets, int64_t panel, const Rows& x, int64_t from, int64_t count, float* product);

constexpr int TOKENS = 32;  // rows of x that are processed together

// Columns of up to TOKENS rows of x side by side, for sparse products with rows of x in the lanes of vectors.
class Columns {
  public:
    explicit Columns(int64_t stride) : stride_(stride), data_(2 * TOKENS * stride) {}
    // Takes the rows from .. from + count.
    void fill(const Rows& x, int64_t from, int64_t count);
    // product (TOKENS, SPARE) with one panel of an ortho stream.
    void sheet(const Sheets& sheets, int64_t panel, float* product) const;

  private:
    int64_t stride_, count_ = 0;
    Buffer data_;
};

}  // namespace avx512
}  // namespace lm_ortho
