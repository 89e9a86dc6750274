// The product in plain C++, with vectors as GCC and Clang extend the language. scalar.cpp and avx2.cpp compile it
// for two instruction sets; the vectors become as many registers as each has.
//
// Products of BF16 values are exact in float32, so both differ only in how they round sums.
#include "dual_stream.h"

#include <algorithm>
#include <cstring>

namespace lm_ortho {
namespace {

constexpr int WIDE = 8;                 // lanes of a vector
constexpr int VECTORS = PANEL / WIDE;   // vectors of a panel
constexpr int64_t DEPTH = 64;           // columns decoded at once: 16 KB of float32
constexpr int64_t TOKENS = 32;          // rows of x that share what is decoded

typedef float Floats __attribute__((vector_size(4 * WIDE)));
typedef int32_t Words __attribute__((vector_size(4 * WIDE)));

// weights (8 * chunks, PANEL): codes as numbers, without their scale.
void decode(const uint8_t* codes, int64_t chunks, int plane, int planes, Floats* weights) {
    const float factor = planes == 2 && plane == 0 ? 16.0f : 1.0f;
    const float zero = plane == 1 ? 0.0f : 8.0f;
    for (int64_t c = 0; c < chunks; ++c)
        for (int v = 0; v < VECTORS; ++v) {
            Words word;
            std::memcpy(&word, codes + c * CHUNK_BYTES + v * sizeof word, sizeof word);
            for (int k = 0; k < CHUNK; ++k) {
                const Words nibble = (word >> (4 * (k / 2) + 16 * (k % 2))) & 15;
                weights[(c * CHUNK + k) * VECTORS + v] = (__builtin_convertvector(nibble, Floats) - zero) * factor;
            }
        }
}

struct Generic {
    const Job& job;
    const Buffer& x;  // (rows, stride) float32, padded with zeros
    int64_t stride;

    // sums (PANEL) += weights (depth, PANEL) times one row of x.
    static void dot(const Floats* weights, const float* x, int64_t depth, Floats* sums) {
        Floats kept[VECTORS];
        std::copy(sums, sums + VECTORS, kept);
        for (int64_t k = 0; k < depth; ++k)
            for (int v = 0; v < VECTORS; ++v) kept[v] += weights[k * VECTORS + v] * x[k];
        std::copy(kept, kept + VECTORS, sums);
    }

    // totals (count, PANEL) of rows from .. from + count.
    void base(const uint8_t* panel, int64_t from, int64_t count, Floats* weights, Floats* sums, Floats* totals) const {
        std::memset(static_cast<void*>(totals), 0, count * PANEL * sizeof(float));
        for (int64_t g = 0; g < job.groups; ++g) {
            const uint8_t* at = panel + g * job.group_bytes();
            float scales[PANEL];
            for (int r = 0; r < PANEL; ++r) scales[r] = widen(reinterpret_cast<const uint16_t*>(at)[r]);
            at += 2 * PANEL;
            std::memset(static_cast<void*>(sums), 0, count * PANEL * sizeof(float));
            for (int plane = 0; plane < job.planes; ++plane)
                for (int64_t k = 0; k < job.group; k += DEPTH) {
                    const int64_t depth = std::min(DEPTH, job.group - k);
                    decode(at, depth / CHUNK, plane, job.planes, weights);
                    at += depth / CHUNK * CHUNK_BYTES;
                    for (int64_t m = 0; m < count; ++m)
                        dot(weights, row(from + m) + g * job.group + k, depth, sums + m * VECTORS);
                }
            for (int64_t m = 0; m < count; ++m)
                for (int v = 0; v < VECTORS; ++v) {
                    Floats scale;
                    std::memcpy(&scale, scales + v * WIDE, sizeof scale);
                    totals[m * VECTORS + v] += sums[m * VECTORS + v] * scale;
                }
        }
    }

    // product (PANEL + 1) of one row of x with a panel of an ortho stream; the last entry is rubbish.
    static void sheet(const Sheets& sheets, int64_t panel, const float* x, float* product) {
        std::fill(product, product + PANEL + 1, 0.0f);
        for (uint32_t g = sheets.panel_groups[panel]; g < sheets.panel_groups[panel + 1]; ++g) {
            float lanes[LANES] = {};
            for (uint32_t s = sheets.group_steps[g]; s < sheets.group_steps[g + 1]; ++s) {
                const uint8_t* step = sheets.steps + static_cast<size_t>(s) * STEP_BYTES;
                const float* window = x + sheets.step_bases[s];
                uint16_t values[SLOTS];
                std::memcpy(values, step + SLOTS, sizeof values);
                for (int i = 0; i < SLOTS; ++i) lanes[i / 2] += window[step[i]] * widen(values[i]);
            }
            for (int lane = 0; lane < LANES; ++lane) product[sheets.lane_rows[g * LANES + lane]] += lanes[lane];
        }
    }

    void finish(int64_t m, int64_t panel, float* totals) const {
        for (int t = 0; t < job.n_terms; ++t) {
            const float alpha = job.terms[t].of_row(m);
            if (alpha == 0.0f) continue;
            float product[PANEL + 1];
            sheet(job.terms[t].sheets, panel, row(m), product);
            for (int r = 0; r < PANEL; ++r) totals[r] += alpha * product[r];
        }
        const int64_t columns = std::min<int64_t>(PANEL, job.out_features - panel * PANEL);
        for (int64_t r = 0; r < columns; ++r) {
            const float sum = totals[r] + (job.bias ? job.bias[panel * PANEL + r] : 0.0f);
            const int64_t at = m * job.out_features + panel * PANEL + r;
            if (job.y_float)
                static_cast<float*>(job.y)[at] = sum;
            else
                static_cast<uint16_t*>(job.y)[at] = narrow(sum);
        }
    }

    const float* row(int64_t m) const { return x.as<float>() + m * stride; }

    void run(int worker, int workers) const {
        const Buffer weights(sizeof(float) * DEPTH * PANEL), sums(sizeof(float) * TOKENS * PANEL);
        const Buffer totals(sizeof(float) * TOKENS * PANEL);
        const int64_t panels = job.panels();
        for (int64_t p = panels * worker / workers; p < panels * (worker + 1) / workers; ++p)
            for (int64_t from = 0; from < job.rows; from += TOKENS) {
                const int64_t count = std::min(TOKENS, job.rows - from);
                base(job.panel(p), from, count, weights.as<Floats>(), sums.as<Floats>(), totals.as<Floats>());
                for (int64_t m = 0; m < count; ++m) finish(from + m, p, totals.as<float>() + m * PANEL);
            }
    }
};

void generic_worker(void* context, int worker, int workers) {
    static_cast<const Generic*>(context)->run(worker, workers);
}

void run_generic(const Job& job) {
    const int64_t stride = job.width() + WINDOW;
    const Buffer x(sizeof(float) * job.rows * stride);
    for (int64_t m = 0; m < job.rows; ++m) {
        float* row = x.as<float>() + m * stride;
        for (int64_t k = 0; k < job.in_features; ++k) row[k] = widen(job.x[m * job.in_features + k]);
        std::fill(row + job.in_features, row + stride, 0.0f);
    }
    Generic generic{job, x, stride};
    parallel(job.threads, generic_worker, &generic);
}

}  // namespace
}  // namespace lm_ortho
