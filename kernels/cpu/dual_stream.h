// The dual-stream product on a CPU: y = x W_base^T + sum_j alpha_j (x W_ortho_j^T) + bias.
//
// Plain C ABI, no header of torch: the library works beside any build of torch, and a program without
// Python can call it (tests/asan_driver.cpp does).
//
// Layouts, made once by the functions of pack.cpp:
//
// PANELS. 64 output rows form a panel, 4 blocks of 16. For each group of `group` columns a panel stores
//   64 scales (BF16), then for each plane and each chunk of 8 columns 4 x 64 bytes, one 64-byte word per block.
//   In a word the 32-bit lane r belongs to row r of the block; its bits 4j .. 4j+3 hold the code of column 2j,
//   bits 16+4j .. 16+4j+3 that of column 2j+1 (j = 0..3). So `word >> 4j` has a pair of codes in the low
//   nibbles of its 16-bit halves, which is what a 16-bit table look-up and a BF16 pair product want, and a
//   panel is one sequential stream. Codes of 3 and 4 bits take one plane (stored as code + 8), codes of
//   8 bits two: 16 * (high nibble - 8), then the low nibble. Missing rows and columns are code 0.
//
// SHEETS. The ortho stream in steps of 16 lanes x 2 values. A step has a column `base`; every slot is an 8-bit
//   distance from it and a BF16 value, so 32 values of x are looked up in 256 neighbouring ones without a
//   gather, and one BF16 pair product adds two values to each lane. A lane belongs to a row of its panel; long
//   rows are spread over several lanes. Empty slots are distance 0, value 0.
#pragma once
#include <cstdint>
#include <cstddef>

#define LM_ORTHO_API __attribute__((visibility("default")))

namespace lm_ortho {

constexpr int PANEL = 64;      // output rows of a panel
constexpr int BLOCK = 16;      // 32-bit lanes of a vector
constexpr int CHUNK = 8;       // columns whose codes fill one 32-bit lane
constexpr int CHUNK_BYTES = 4 * PANEL;
constexpr int LANES = 16;      // lanes of a step
constexpr int SLOTS = 32;      // values of a step
constexpr int WINDOW = 256;    // columns a step can reach
constexpr int STEP_BYTES = SLOTS + 2 * SLOTS;
constexpr int BASE_ALIGN = 32; // a window begins at a multiple: 64 bytes of BF16
constexpr uint8_t NO_ROW = PANEL;  // the row of a lane without values

// What an entry point returns. Sizes and indices come from files: each is checked before memory is touched.
enum Status {
    OK = 0,
    NO_ISA = 1,       // the processor lacks the instruction set
    NO_MEMORY = 2,    // memory ran out
    BAD_SIZE = 3,     // an array is shorter or longer than the other arguments say, misaligned or missing
    BAD_ROWPTR = 4,   // row pointers do not rise from 0 to the number of values
    BAD_COLUMN = 5,   // a column outside [0, in_features), or not larger than the one before it in its row
    BAD_SHEETS = 6,   // packed sheets of another matrix, or damaged ones
    TOO_LARGE = 7,    // more steps than 32 bits can count
};

// *product = a * b; false if that is negative or does not fit.
inline bool multiply(int64_t a, int64_t b, int64_t* product) {
    return a >= 0 && b >= 0 && !__builtin_mul_overflow(a, b, product);
}

// The bytes of all panels of a matrix; false for a lattice that does not exist or a size that does not fit.
inline bool panels_bytes(int64_t out_features, int64_t in_features, int64_t group, int planes, int64_t* bytes) {
    constexpr int64_t LIMIT = INT64_C(1) << 40;  // far above any layer, so that the sums below cannot overflow
    if (out_features < 1 || in_features < 1 || out_features > LIMIT || in_features > LIMIT) return false;
    if (group < CHUNK || group % CHUNK != 0 || group > LIMIT || planes < 1 || planes > 2) return false;
    const int64_t groups = (in_features + group - 1) / group, panels = (out_features + PANEL - 1) / PANEL;
    const int64_t group_bytes = 2 * PANEL + planes * (group / CHUNK) * CHUNK_BYTES;
    return multiply(groups, group_bytes, bytes) && multiply(*bytes, panels, bytes);
}

// A view of one sheet blob; pack.cpp describes its layout.
struct Sheets {
    const uint32_t* panel_groups;  // (panels + 1) first group of each panel
    const uint32_t* group_steps;   // (groups + 1) first step of each group
    const uint8_t* lane_rows;      // (groups, LANES) row within the panel, or NO_ROW
    const uint32_t* step_bases;    // (steps)
    const uint8_t* steps;          // (steps, STEP_BYTES): 32 distances, then 32 BF16 values
    uint64_t n_groups, n_steps;
};

// The view of a blob of `bytes` bytes for a matrix of so many panels; false for one of another size. Its contents are
// those that lm_ortho_check_sheets has accepted.
bool view_sheets(const uint8_t* blob, int64_t bytes, int64_t panels, Sheets* sheets);

// One ortho stream with its alpha: `stride` 0 for one alpha for all rows, 1 for one per row of x.
struct Term {
    Sheets sheets;
    const float* alpha;
    int64_t stride;
    float of_row(int64_t row) const { return alpha[row * stride]; }
    bool active(int64_t first, int64_t count) const {
        for (int64_t row = first; row < first + count; ++row)
            if (of_row(row) != 0.0f) return true;
        return false;
    }
};

// The arguments of the kernel of every instruction set. x is padded to `width` = a multiple of the group, and beyond it by WINDOW.
struct Job {
    int64_t rows, in_features, out_features;
    int64_t group, groups;
    int planes;
    const uint16_t* x;    // (rows, in_features) BF16, contiguous
    const uint8_t* base;  // panels
    const float* bias;    // (out_features) or null
    const Term* terms;
    int n_terms;
    void* y;              // (rows, out_features) BF16, or float32 when y_float
    bool y_float;
    int threads;

    int64_t width() const { return groups * group; }
    int64_t panels() const { return (out_features + PANEL - 1) / PANEL; }
    int64_t group_bytes() const { return 2 * PANEL + planes * (group / CHUNK) * CHUNK_BYTES; }
    const uint8_t* panel(int64_t p) const { return base + p * groups * group_bytes(); }
    bool sparse(int64_t first, int64_t count) const {
        for (int t = 0; t < n_terms; ++t)
            if (terms[t].active(first, count)) return true;
        return false;
    }
};

// Runs body(context, worker, workers) on `threads` threads and waits for all of them.
void parallel(int threads, void (*body)(void*, int, int), void* context);

void run_scalar(const Job& job);
void run_avx2(const Job& job);
void run_avx512(const Job& job);

// Memory that vectors can be loaded from, freed at the end of the scope.
class Buffer {
  public:
    explicit Buffer(size_t bytes);
    ~Buffer();
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    template <class T> T* as() const { return static_cast<T*>(data_); }

  private:
    void* data_;
};

inline float widen(uint16_t value) {
    uint32_t bits = static_cast<uint32_t>(value) << 16;
    float wide;
    __builtin_memcpy(&wide, &bits, 4);
    return wide;
}

// To nearest, ties to even; a NaN stays one.
inline uint16_t narrow(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

}  // namespace lm_ortho
