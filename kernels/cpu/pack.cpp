// Converts the tensors of a checkpoint to the layouts of dual_stream.h.
#include "dual_stream.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <memory>
#include <vector>

namespace lm_ortho {
namespace {

// A blob begins with five 64-bit numbers: panels, groups of lanes, steps, and where lane_rows and steps begin.
constexpr size_t HEADER = 5 * sizeof(uint64_t);

size_t round_up(size_t bytes) { return (bytes + 63) / 64 * 64; }

struct Places {
    size_t group_steps, step_bases, lane_rows, steps, end;
    Places(size_t panels, size_t groups, size_t steps_) {
        group_steps = HEADER + 4 * (panels + 1);
        step_bases = group_steps + 4 * (groups + 1);
        lane_rows = step_bases + 4 * steps_;
        steps = round_up(lane_rows + LANES * groups);
        end = steps + STEP_BYTES * steps_;
    }
};

// The values of one row, or of every nth value of it, that share a lane.
struct Strand {
    int row;
    int64_t next, end, stride;
    int64_t length() const { return next < end ? (end - next + stride - 1) / stride : 0; }
};

template <class Index>
std::vector<Strand> strands_of(const Index* rowptr, int64_t first, int64_t last) {
    // A lane holds at most one and a half times the mean of the panel, so that one long row does not leave the
    // other 15 lanes empty.
    const int64_t values = rowptr[last] - rowptr[first];
    const int64_t longest = std::max<int64_t>(8, (3 * values / PANEL + 1) / 2);
    std::vector<Strand> strands;
    for (int64_t row = first; row < last; ++row) {
        const int64_t begin = rowptr[row], end = rowptr[row + 1];
        const int64_t pieces = (end - begin + longest - 1) / longest;
        for (int64_t piece = 0; piece < pieces; ++piece)
            strands.push_back({static_cast<int>(row - first), begin + piece, end, pieces});
    }
    std::stable_sort(strands.begin(), strands.end(),
                     [](const Strand& a, const Strand& b) { return a.length() > b.length(); });
    return strands;
}

struct Packed {
    std::vector<uint32_t> panel_groups{0}, group_steps{0}, step_bases;
    std::vector<uint8_t> lane_rows, steps;

    size_t n_panels() const { return panel_groups.size() - 1; }
    size_t n_groups() const { return group_steps.size() - 1; }
    size_t n_steps() const { return step_bases.size(); }
    Places places() const { return Places(n_panels(), n_groups(), n_steps()); }
};

// Every step begins at the lane that is furthest behind; the others give what they have in its window.
void pack_lanes(std::vector<Strand> lanes, const int32_t* cols, const uint16_t* vals, Packed& out) {
    for (;;) {
        int64_t lowest = INT64_MAX;
        for (const Strand& lane : lanes)
            if (lane.next < lane.end) lowest = std::min<int64_t>(lowest, cols[lane.next]);
        if (lowest == INT64_MAX) break;
        const int64_t base = lowest / BASE_ALIGN * BASE_ALIGN;
        uint8_t distances[SLOTS] = {};
        uint16_t values[SLOTS] = {};
        for (size_t lane = 0; lane < lanes.size(); ++lane)
            for (int half = 0; half < 2; ++half) {
                Strand& strand = lanes[lane];
                if (strand.next >= strand.end || cols[strand.next] - base >= WINDOW) break;
                distances[2 * lane + half] = static_cast<uint8_t>(cols[strand.next] - base);
                values[2 * lane + half] = vals[strand.next];
                strand.next += strand.stride;
            }
        out.step_bases.push_back(static_cast<uint32_t>(base));
        out.steps.insert(out.steps.end(), distances, distances + SLOTS);
        const auto* bytes = reinterpret_cast<const uint8_t*>(values);
        out.steps.insert(out.steps.end(), bytes, bytes + sizeof values);
    }
    out.group_steps.push_back(static_cast<uint32_t>(out.step_bases.size()));
}

template <class Index>
Packed pack_sheets(const Index* rowptr, const int32_t* cols, const uint16_t* vals, int64_t rows) {
    Packed out;
    for (int64_t first = 0; first < rows; first += PANEL) {
        const auto strands = strands_of(rowptr, first, std::min<int64_t>(first + PANEL, rows));
        for (size_t at = 0; at < strands.size(); at += LANES) {
            const size_t end = std::min(at + LANES, strands.size());
            pack_lanes({strands.begin() + at, strands.begin() + end}, cols, vals, out);
            for (size_t lane = at; lane < at + LANES; ++lane)
                out.lane_rows.push_back(lane < end ? static_cast<uint8_t>(strands[lane].row) : NO_ROW);
        }
        out.panel_groups.push_back(static_cast<uint32_t>(out.group_steps.size() - 1));
    }
    return out;
}

// Row pointers and columns, by comparison: a difference of two of them could wrap around.
template <class Index>
Status check_csr(const Index* rowptr, const int32_t* cols, int64_t rows, int64_t nnz, int64_t in_features) {
    if (rowptr[0] != 0 || rowptr[rows] != nnz) return BAD_ROWPTR;
    for (int64_t row = 0; row < rows; ++row)
        if (rowptr[row] > rowptr[row + 1]) return BAD_ROWPTR;
    for (int64_t row = 0; row < rows; ++row) {
        int64_t last = -1;
        for (int64_t i = rowptr[row]; i < rowptr[row + 1]; ++i) {
            if (cols[i] <= last || cols[i] >= in_features) return BAD_COLUMN;
            last = cols[i];
        }
    }
    return OK;
}

// Whether counts rise from 0 to `last`.
bool rises(const uint32_t* counts, uint64_t steps, uint64_t last) {
    for (uint64_t i = 0; i < steps; ++i)
        if (counts[i] > counts[i + 1]) return false;
    return counts[0] == 0 && counts[steps] == last;
}

template <class Index>
Status make_sheets(const void* rowptr, const int32_t* cols, const uint16_t* vals, int64_t rows, int64_t nnz,
                   int64_t in_features, void** packed, int64_t* bytes) {
    const auto* pointers = static_cast<const Index*>(rowptr);
    if (const Status status = check_csr(pointers, cols, rows, nnz, in_features); status != OK) return status;
    auto result = std::make_unique<Packed>(pack_sheets(pointers, cols, vals, rows));
    if (result->n_steps() > UINT32_MAX) return TOO_LARGE;
    *bytes = static_cast<int64_t>(result->places().end);
    *packed = result.release();
    return OK;
}

template <class T> void put(uint8_t* blob, size_t at, const std::vector<T>& data) {
    if (!data.empty()) std::memcpy(blob + at, data.data(), data.size() * sizeof(T));
}

}  // namespace

bool view_sheets(const uint8_t* blob, int64_t bytes, int64_t panels, Sheets* sheets) {
    if (blob == nullptr || bytes < static_cast<int64_t>(HEADER) || reinterpret_cast<uintptr_t>(blob) % 8 != 0) return false;
    uint64_t header[5];
    std::memcpy(header, blob, HEADER);
    // No count exceeds the bytes, so that the sums of Places cannot overflow.
    for (int i = 0; i < 3; ++i)
        if (header[i] > static_cast<uint64_t>(bytes)) return false;
    const Places at(header[0], header[1], header[2]);
    if (static_cast<int64_t>(header[0]) != panels || at.end != static_cast<uint64_t>(bytes)) return false;
    if (header[3] != at.lane_rows || header[4] != at.steps) return false;
    *sheets = {reinterpret_cast<const uint32_t*>(blob + HEADER),
               reinterpret_cast<const uint32_t*>(blob + at.group_steps),
               blob + at.lane_rows,
               reinterpret_cast<const uint32_t*>(blob + at.step_bases),
               blob + at.steps,
               header[1],
               header[2]};
    return true;
}

}  // namespace lm_ortho

using namespace lm_ortho;

extern "C" {

// codes: (rows, width) signed bytes of the next rows, beginning with a new panel; width a multiple of the group.
// scales: (rows, width / group) BF16. Writes ceil(rows / 64) panels to `out`, which has `out_bytes` bytes or more.
// The sizes are counted in values. Returns a Status.
LM_ORTHO_API int lm_ortho_pack_base(const int8_t* codes, int64_t n_codes, const uint16_t* scales, int64_t n_scales,
                                    int64_t rows, int64_t width, int64_t group, int planes, uint8_t* out,
                                    int64_t out_bytes) {
    int64_t needed, expected;
    if (codes == nullptr || scales == nullptr || out == nullptr) return BAD_SIZE;
    if (!panels_bytes(rows, width, group, planes, &needed) || width % group != 0 || out_bytes < needed) return BAD_SIZE;
    if (!multiply(rows, width, &expected) || n_codes != expected || n_scales != expected / group) return BAD_SIZE;
    const int64_t groups = width / group, chunks = group / CHUNK;
    for (int64_t first = 0; first < rows; first += PANEL)
        for (int64_t g = 0; g < groups; ++g) {
            auto* scale = reinterpret_cast<uint16_t*>(out);
            for (int r = 0; r < PANEL; ++r) scale[r] = first + r < rows ? scales[(first + r) * groups + g] : 0;
            out += 2 * PANEL;
            for (int plane = 0; plane < planes; ++plane)
                for (int64_t c = 0; c < chunks; ++c, out += CHUNK_BYTES)
                    for (int r = 0; r < PANEL; ++r) {
                        uint32_t word = 0;
                        for (int k = 0; k < CHUNK; ++k) {
                            const int code = first + r < rows ? codes[(first + r) * width + g * group + c * CHUNK + k] : 0;
                            const int nibble = planes == 1 ? code + 8 : plane == 0 ? (code + 128) >> 4 : (code + 128) & 15;
                            word |= static_cast<uint32_t>(nibble) << (4 * (k / 2) + 16 * (k % 2));
                        }
                        std::memcpy(out + 4 * r, &word, 4);
                    }
        }
    return OK;
}

// The sheets of a CSR matrix (rows, in_features) with `nnz` values (`wide`: rowptr is 64 bits), to be handed to
// lm_ortho_take_sheets once; `bytes` gets what they need. Returns a Status.
LM_ORTHO_API int lm_ortho_make_sheets(const void* rowptr, int wide, const int32_t* cols, const uint16_t* vals,
                                      int64_t rows, int64_t nnz, int64_t in_features, void** packed, int64_t* bytes) {
    *packed = nullptr;
    *bytes = 0;
    if (rowptr == nullptr || rows < 1 || nnz < 0 || in_features < 1) return BAD_SIZE;
    if (nnz > 0 && (cols == nullptr || vals == nullptr)) return BAD_SIZE;
    try {
        return wide ? make_sheets<int64_t>(rowptr, cols, vals, rows, nnz, in_features, packed, bytes)
                    : make_sheets<int32_t>(rowptr, cols, vals, rows, nnz, in_features, packed, bytes);
    } catch (const std::exception&) {
        return NO_MEMORY;
    }
}

// Writes the sheets to `out` and frees what lm_ortho_make_sheets gave, also when `out_bytes` is another number than it
// gave. Returns a Status.
LM_ORTHO_API int lm_ortho_take_sheets(void* made, uint8_t* out, int64_t out_bytes) {
    const std::unique_ptr<Packed> packed(static_cast<Packed*>(made));
    if (packed == nullptr || out == nullptr) return BAD_SIZE;
    const Places at = packed->places();
    if (out_bytes < 0 || static_cast<uint64_t>(out_bytes) != at.end) return BAD_SIZE;
    const uint64_t header[5] = {packed->n_panels(), packed->n_groups(), packed->n_steps(), at.lane_rows, at.steps};
    std::memcpy(out, header, HEADER);
    std::memset(out + at.lane_rows, 0, at.steps - at.lane_rows);  // what lies between is the same every time, too
    put(out, HEADER, packed->panel_groups);
    put(out, at.group_steps, packed->group_steps);
    put(out, at.step_bases, packed->step_bases);
    put(out, at.lane_rows, packed->lane_rows);
    put(out, at.steps, packed->steps);
    return OK;
}

// Checks every index in a blob of sheets, once, before products read it. Returns a Status.
LM_ORTHO_API int lm_ortho_check_sheets(const uint8_t* blob, int64_t bytes, int64_t out_features, int64_t in_features) {
    Sheets sheets;
    if (out_features < 1 || in_features < 1) return BAD_SIZE;
    const int64_t panels = (out_features - 1) / PANEL + 1;
    if (!view_sheets(blob, bytes, panels, &sheets)) return BAD_SHEETS;
    if (!rises(sheets.panel_groups, static_cast<uint64_t>(panels), sheets.n_groups)) return BAD_SHEETS;
    if (!rises(sheets.group_steps, sheets.n_groups, sheets.n_steps)) return BAD_SHEETS;
    for (uint64_t lane = 0; lane < sheets.n_groups * LANES; ++lane)
        if (sheets.lane_rows[lane] > NO_ROW) return BAD_SHEETS;
    for (uint64_t step = 0; step < sheets.n_steps; ++step)
        if (sheets.step_bases[step] % BASE_ALIGN != 0 || sheets.step_bases[step] >= in_features) return BAD_SHEETS;
    return OK;
}

}  // extern "C"
