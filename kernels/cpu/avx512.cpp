// AVX-512 with BF16 pair products (Zen 4, Sapphire Rapids and later): the base product, and the order of work.
// Codes are decoded in registers and never written, not even for many rows: writing tiles of decoded weights and
// reading them again was slower at every number of rows.
#include "avx512.h"

namespace lm_ortho {
namespace avx512 {
namespace {

// Rows of x per pass over the codes: 6 rows * 4 blocks of sums, 4 weights, a table and a broadcast fill the 32 registers.
// More rows take the blocks of a panel two by two, 12 rows at most, which decodes each word for twice as many products.
constexpr int FEW = 6, MOST = 12;
constexpr int64_t AHEAD = 4096;  // bytes: how far codes and scales are prefetched
constexpr int64_t PART = 256;    // columns that several passes go over before the next: 9 KB of codes and scales

// One pair of columns of a chunk, T rows of x.
template <int T, int B, int J>
inline void pair_step(const uint8_t* const (&words)[B], __m512i codes, const uint16_t* x, int64_t stride, __m512 (&sums)[T][B]) {
    // The compiler would keep the words of all four steps in registers that the sums need; they are read again instead.
    if constexpr (T * B >= 16) asm volatile("" ::: "memory");
    __m512bh weights[B];
    for (int b = 0; b < B; ++b) weights[b] = (__m512bh)decode<J>(_mm512_load_si512(words[b]), codes);
    for (int t = 0; t < T; ++t) {
        const __m512bh two = pair_of(x + t * stride, J);
        for (int b = 0; b < B; ++b) sums[t][b] = _mm512_dpbf16_ps(sums[t][b], weights[b], two);
    }
}

// sums (T, B): T rows of x with one group of columns of B blocks, without the scale.
template <int T, int B>
inline void group_sums(const Base& base, const uint8_t* const* blocks, int64_t g, const uint16_t* x, int64_t ahead,
                       __m512 (&sums)[T][B]) {
    for (int t = 0; t < T; ++t)
        for (int b = 0; b < B; ++b) sums[t][b] = _mm512_setzero_ps();
    for (int plane = 0; plane < base.planes; ++plane) {
        const __m512i codes = base.tables[plane];
        const int64_t offset = g * base.group_bytes + 2 * PANEL + plane * base.chunks * CHUNK_BYTES;
        for (int64_t c = 0; c < base.chunks; ++c) {
            const uint8_t* words[B];
            for (int b = 0; b < B; ++b) {
                words[b] = blocks[b] + offset + c * CHUNK_BYTES;
                _mm_prefetch(reinterpret_cast<const char*>(words[b]) + ahead, _MM_HINT_T0);
            }
            const uint16_t* columns = x + g * base.group + c * CHUNK;
            pair_step<T, B, 0>(words, codes, columns, base.stride, sums);
            pair_step<T, B, 1>(words, codes, columns, base.stride, sums);
            pair_step<T, B, 2>(words, codes, columns, base.stride, sums);
            pair_step<T, B, 3>(words, codes, columns, base.stride, sums);
        }
    }
}

// Groups of columns, and how far beyond them memory is prefetched.
struct Range {
    int64_t begin, end, ahead;
};

// total (T, between): the base products of T rows with B blocks from block `first` of a panel on, in a range of groups;
// added to those of the groups before.
template <int T, int B>
void base_product(const Base& base, const uint8_t* panel, int first, const uint16_t* x, Range range, float* total,
                  int64_t between) {
    const uint8_t *blocks[B], *scales[B];
    for (int b = 0; b < B; ++b) {
        const uint8_t* start = panel + (first + b) / BLOCKS * base.groups * base.group_bytes;
        blocks[b] = start + (first + b) % BLOCKS * 64;
        scales[b] = start + (first + b) % BLOCKS * 32;
    }
    total += first * BLOCK;
    if (range.begin == 0)
        for (int t = 0; t < T; ++t) std::memset(total + t * between, 0, sizeof(float) * B * BLOCK);
    for (int64_t g = range.begin; g < range.end; ++g) {
        __m512 sums[T][B];
        group_sums<T, B>(base, blocks, g, x, range.ahead, sums);
        for (int b = 0; b < B; ++b) {
            const __m512 scale = wide16(reinterpret_cast<const uint16_t*>(scales[b] + g * base.group_bytes));
            for (int t = 0; t < T; ++t) {
                float* at = total + t * between + b * BLOCK;
                _mm512_store_ps(at, _mm512_fmadd_ps(sums[t][b], scale, _mm512_load_ps(at)));
            }
        }
    }
}

template <int T>
void panel_rows(const Base& base, const uint8_t* panel, const uint16_t* x, Range range, float* total) {
    constexpr int B = T <= FEW ? BLOCKS : BLOCKS / 2;
    for (int first = 0; first < BLOCKS; first += B) base_product<T, B>(base, panel, first, x, range, total, PANEL);
}

// total (rows, PANEL): up to MOST rows of x with one panel.
void panel_product(const Base& base, const uint8_t* panel, const uint16_t* x, int64_t rows, Range range, float* total) {
    switch (rows) {
        case 1: return panel_rows<1>(base, panel, x, range, total);
        case 2: return panel_rows<2>(base, panel, x, range, total);
        case 3: return panel_rows<3>(base, panel, x, range, total);
        case 4: return panel_rows<4>(base, panel, x, range, total);
        case 5: return panel_rows<5>(base, panel, x, range, total);
        case 6: return panel_rows<6>(base, panel, x, range, total);
        case 7: return panel_rows<7>(base, panel, x, range, total);
        case 8: return panel_rows<8>(base, panel, x, range, total);
        case 9: return panel_rows<9>(base, panel, x, range, total);
        case 10: return panel_rows<10>(base, panel, x, range, total);
        case 11: return panel_rows<11>(base, panel, x, range, total);
        default: return panel_rows<12>(base, panel, x, range, total);
    }
}

constexpr int64_t PREFETCHED = 2048;  // bytes of steps that are prefetched while the base product is computed
constexpr int64_t MIN_TRANSPOSED = 8;  // rows of x from which transposing x makes the sparse products faster

// The operands and buffers of one thread.
struct Worker {
    const Job& job;
    const Rows& x;
    const Base base;
    Columns columns;
    Buffer total, products;  // (2 * TOKENS, PANEL), (terms, TOKENS, SPARE)

    Worker(const Job& job_, const Rows& x_)
        : job(job_), x(x_), base(job_, x_.stride), columns(is_transposed() ? x_.stride : 0), total(sizeof(float) * 2 * TOKENS * PANEL),
          products(sizeof(float) * std::max(1, job_.n_terms) * TOKENS * SPARE) {}

    bool is_transposed() const { return job.rows >= MIN_TRANSPOSED && job.sparse(0, job.rows); }

    // Sparse products of rows from .. from + count with one panel, then y from them and from `sums` (count, PANEL).
    void complete(int64_t panel, int64_t from, int64_t count, const float* sums) {
        for (int t = 0; t < job.n_terms; ++t) {
            if (!job.terms[t].active(from, count)) continue;
            float* product = products.as<float>() + t * TOKENS * SPARE;
            if (count >= MIN_TRANSPOSED)
                columns.sheet(job.terms[t].sheets, panel, product);
            else
                sheet_by_rows(job.terms[t].sheets, panel, x, from, count, product);
        }
        for (int64_t m = 0; m < count; ++m)
            finish(job, from + m, panel, sums + m * PANEL, products.as<float>() + m * SPARE, TOKENS * SPARE);
    }

    // Prefetches the first steps of a panel, which are needed after its base product.
    void prefetch_steps(int64_t panel, int64_t from, int64_t count) const {
        for (int t = 0; t < job.n_terms; ++t) {
            if (!job.terms[t].active(from, count)) continue;
            const Sheets& sheets = job.terms[t].sheets;
            const size_t first = sheets.group_steps[sheets.panel_groups[panel]];
            const auto* steps = reinterpret_cast<const char*>(sheets.steps + first * STEP_BYTES);
            for (int64_t i = 0; i < PREFETCHED; i += 64) _mm_prefetch(steps + i, _MM_HINT_T1);
        }
    }

    void panel(int64_t panel, int64_t from, int64_t count) {
        prefetch_steps(panel, from, count);
        const int64_t tiles = (count + MOST - 1) / MOST;
        // Several passes go over a part of the panel at a time, which stays in the second-level cache; the last one finds
        // it there and may fetch the next part meanwhile.
        const int64_t part = tiles > 1 ? std::max<int64_t>(1, PART / base.group) : base.groups;
        for (int64_t g = 0; g < base.groups; g += part) {
            const int64_t end = std::min(g + part, base.groups);
            for (int64_t tile = 0; tile < tiles; ++tile) {
                const int64_t m = count * tile / tiles, some = count * (tile + 1) / tiles - m;
                const bool last = tiles > 1 && tile + 1 == tiles;
                const Range range{g, end, last ? (end - g) * base.group_bytes : AHEAD};
                panel_product(base, job.panel(panel), x.row(from + m), some, range, total.as<float>() + m * PANEL);
            }
        }
        complete(panel, from, count, total.as<float>());
    }

    // One row takes two panels at once: a chain of pair products is slow, and eight of them keep the units busy.
    void two_panels(int64_t panel) {
        prefetch_steps(panel, 0, 1);
        prefetch_steps(panel + 1, 0, 1);
        base_product<1, 2 * BLOCKS>(base, job.panel(panel), 0, x.row(0), {0, base.groups, AHEAD}, total.as<float>(), 0);
        complete(panel, 0, 1, total.as<float>());
        complete(panel + 1, 0, 1, total.as<float>() + PANEL);
    }

    void run(int worker, int workers) {
        const int64_t units = (job.panels() + 1) / 2;
        const int64_t begin = 2 * (units * worker / workers), end = std::min(job.panels(), 2 * (units * (worker + 1) / workers));
        for (int64_t from = 0; from < job.rows; from += TOKENS) {
            const int64_t count = std::min<int64_t>(TOKENS, job.rows - from);
            if (count >= MIN_TRANSPOSED && job.sparse(from, count)) columns.fill(x, from, count);
            for (int64_t p = begin; p < end;)
                if (job.rows == 1 && p + 1 < end) {
                    two_panels(p);
                    p += 2;
                } else {
                    panel(p++, from, count);
                }
        }
    }
};

struct Input {
    const Job& job;
    const Rows& x;
};

void work(void* context, int worker, int workers) {
    const auto* input = static_cast<const Input*>(context);
    Worker(input->job, input->x).run(worker, workers);
}

}  // namespace
}  // namespace avx512

void run_avx512(const Job& job) {
    const avx512::Rows x(job);
    avx512::Input input{job, x};
    parallel(job.threads, avx512::work, &input);
}

}  // namespace lm_ortho
