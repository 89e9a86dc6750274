// Runs the C++ kernel on arrays that are exactly as long as its interface says, and compares with double precision.
// tests/kernels/test_cpu_build.py compiles it together with kernels/cpu under AddressSanitizer.
#include "dual_stream.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

extern "C" {
int lm_ortho_isa();
int lm_ortho_linear(int isa, int threads, int64_t rows, int64_t in_features, int64_t out_features, int64_t group,
                    int planes, const uint16_t* x, int64_t x_values, const uint8_t* base, int64_t base_bytes,
                    const float* bias, int n_terms, const uint8_t* const* sheets, const int64_t* sheet_bytes,
                    const float* const* alphas, const int64_t* strides, int y_float, void* y, int64_t y_values);
int lm_ortho_pack_base(const int8_t* codes, int64_t n_codes, const uint16_t* scales, int64_t n_scales, int64_t rows,
                       int64_t width, int64_t group, int planes, uint8_t* out, int64_t out_bytes);
int lm_ortho_make_sheets(const void* rowptr, int wide, const int32_t* cols, const uint16_t* vals, int64_t rows,
                         int64_t nnz, int64_t in_features, void** packed, int64_t* bytes);
int lm_ortho_take_sheets(void* made, uint8_t* out, int64_t out_bytes);
int lm_ortho_check_sheets(const uint8_t* blob, int64_t bytes, int64_t out_features, int64_t in_features);
}

namespace {

using lm_ortho::narrow;
using lm_ortho::widen;

struct Free {
    void operator()(void* data) const { std::free(data); }
};
using Bytes = std::unique_ptr<uint8_t, Free>;

Bytes aligned(size_t size) { return Bytes(static_cast<uint8_t*>(std::aligned_alloc(64, (size + 63) / 64 * 64))); }

struct Shape {
    int64_t out, in, group;
    int planes;
    double density;
};

// The largest error over the sum of absolute products, for one shape and number of rows on one instruction set.
double error_of(const Shape& s, int64_t rows, int isa, int threads, std::mt19937& random) {
    std::normal_distribution<float> normal;
    const int64_t groups = (s.in + s.group - 1) / s.group, width = groups * s.group, panels = (s.out + 63) / 64;
    std::vector<int8_t> codes(s.out * width, 0);
    std::vector<uint16_t> scales(s.out * groups), x(rows * s.in), vals;
    std::vector<int32_t> rowptr{0}, cols;
    std::vector<float> bias(s.out), alpha(rows), y(rows * s.out);
    std::vector<double> weight(s.out * s.in), moved(s.out * s.in, 0.0);
    for (auto& scale : scales) scale = narrow(0.01f + std::abs(normal(random)));
    for (auto& value : x) value = narrow(normal(random));
    for (auto& value : bias) value = normal(random);
    for (int64_t m = 0; m < rows; ++m) alpha[m] = static_cast<float>(m % 3) / 2;
    for (int64_t n = 0; n < s.out; ++n) {
        for (int64_t k = 0; k < s.in; ++k) {
            const int span = s.planes == 2 ? 256 : 16;
            const int code = static_cast<int>(random() % span) - span / 2;
            codes[n * width + k] = static_cast<int8_t>(code);
            weight[n * s.in + k] = code * static_cast<double>(widen(scales[n * groups + k / s.group]));
            if (n % 7 != 3 && random() < s.density * 4294967295.0) {
                cols.push_back(static_cast<int32_t>(k));
                vals.push_back(narrow(normal(random)));
                moved[n * s.in + k] = widen(vals.back());
            }
        }
        rowptr.push_back(static_cast<int32_t>(cols.size()));
    }
    const int64_t base_bytes = panels * groups * (128 + s.planes * s.group / 8 * 256);
    const Bytes base = aligned(base_bytes);
    if (lm_ortho_pack_base(codes.data(), codes.size(), scales.data(), scales.size(), s.out, width, s.group, s.planes,
                           base.get(), base_bytes))
        return 1.0;
    int64_t size = 0;
    void* made = nullptr;
    const auto nnz = static_cast<int64_t>(vals.size());
    if (lm_ortho_make_sheets(rowptr.data(), 0, cols.data(), vals.data(), s.out, nnz, s.in, &made, &size)) return 1.0;
    const Bytes sheets = aligned(size);
    if (lm_ortho_take_sheets(made, sheets.get(), size) || lm_ortho_check_sheets(sheets.get(), size, s.out, s.in)) return 1.0;
    const uint8_t* blobs[] = {sheets.get()};
    const float* alphas[] = {alpha.data()};
    const int64_t strides[] = {rows > 1 ? 1 : 0};
    if (lm_ortho_linear(isa, threads, rows, s.in, s.out, s.group, s.planes, x.data(), x.size(), base.get(), base_bytes,
                        bias.data(), 1, blobs, &size, alphas, strides, 1, y.data(), y.size()))
        return 1.0;
    double worst = 0.0;
    for (int64_t m = 0; m < rows; ++m)
        for (int64_t n = 0; n < s.out; ++n) {
            double sum = bias[n], size_of = std::abs(bias[n]);
            for (int64_t k = 0; k < s.in; ++k) {
                const double value = widen(x[m * s.in + k]), w = weight[n * s.in + k], o = moved[n * s.in + k];
                sum += value * (w + alpha[m] * o);
                size_of += std::abs(value) * (std::abs(w) + std::abs(o));
            }
            worst = std::max(worst, std::abs(sum - y[m * s.out + n]) / size_of);
        }
    return worst;
}

// Values at which arithmetic on indices goes wrong, and ones that are nearly right.
template <class T> T hostile(std::mt19937& random, int64_t size) {
    const int64_t values[] = {0, 1, -1, size, size - 1, size + 1, INT64_MAX, INT64_MIN, INT64_MAX - size, -2,
                              INT32_MAX, INT32_MIN, int64_t{1} << 62, int64_t{1} << 40, static_cast<int64_t>(random())};
    return static_cast<T>(values[random() % (sizeof values / sizeof *values)]);
}

bool is_csr(const std::vector<int64_t>& rowptr, const std::vector<int32_t>& cols, int64_t in) {
    if (rowptr.front() != 0 || rowptr.back() != static_cast<int64_t>(cols.size())) return false;
    for (size_t row = 0; row + 1 < rowptr.size(); ++row) {
        if (rowptr[row] > rowptr[row + 1] || rowptr[row] < 0) return false;
        for (int64_t i = rowptr[row]; i < rowptr[row + 1]; ++i) {
            if (i >= static_cast<int64_t>(cols.size()) || cols[i] < 0 || cols[i] >= in) return false;
            if (i > rowptr[row] && cols[i] <= cols[i - 1]) return false;
        }
    }
    return true;
}

// Damaged CSR matrices, blobs of sheets and sizes: each must be refused or give a finite product. The arrays are
// exactly as long as is said, so that AddressSanitizer sees any access beside them. Returns the number of wrong answers.
int64_t attack(int64_t cases, std::mt19937& random, int64_t (&refused)[2]) {
    int64_t wrong = 0;
    for (int64_t n = 0; n < cases; ++n) {
        const int64_t out = 1 + random() % 150, in = 1 + random() % 600;
        std::vector<int64_t> rowptr{0};
        std::vector<int32_t> cols;
        for (int64_t row = 0; row < out; ++row) {
            for (int64_t k = random() % 7; k < in; k += 1 + random() % (in / 2 + 1)) cols.push_back(static_cast<int32_t>(k));
            rowptr.push_back(static_cast<int64_t>(cols.size()));
        }
        if (random() % 4 == 0) cols.clear();  // pointers without values
        const int edits = random() % 3;
        for (int edit = 0; edit < edits; ++edit) {
            if (random() % 2 || cols.empty())
                rowptr[random() % rowptr.size()] = hostile<int64_t>(random, static_cast<int64_t>(cols.size()));
            else
                cols[random() % cols.size()] = hostile<int32_t>(random, in);
        }
        const std::vector<uint16_t> vals(cols.size(), narrow(0.5f));
        void* made = nullptr;
        int64_t size = 0;
        const int status = lm_ortho_make_sheets(rowptr.data(), 1, cols.data(), vals.data(), out,
                                                static_cast<int64_t>(cols.size()), in, &made, &size);
        wrong += (status == 0) != is_csr(rowptr, cols, in);
        refused[0] += status != 0;
        if (status) continue;
        // The blob in an array of its own size, then with single bytes overwritten.
        Bytes blob = aligned(size);
        if (lm_ortho_take_sheets(made, blob.get(), size)) return wrong + 1;
        const int64_t header_bytes = size < 400 ? size : 400;
        for (int edit = random() % 3; edit > 0; --edit)
            blob.get()[random() % (random() % 2 ? header_bytes : size)] = static_cast<uint8_t>(random());
        const int64_t claimed_size = random() % 5 ? size : hostile<int64_t>(random, size);
        if (claimed_size > size || lm_ortho_check_sheets(blob.get(), claimed_size, out, in)) {
            ++refused[1];
            continue;
        }
        const int64_t groups = (in + 63) / 64, base_bytes = (out + 63) / 64 * groups * (128 + 8 * 256);
        const Bytes base = aligned(base_bytes);
        for (int64_t i = 0; i < base_bytes; ++i) base.get()[i] = 0;
        const std::vector<uint16_t> x(3 * in, narrow(1.0f));
        std::vector<float> y(3 * out);
        const float one = 1.0f;
        const uint8_t* blobs[] = {blob.get()};
        const float* alphas[] = {&one};
        const int64_t strides[] = {0};
        for (int isa = 0; isa <= lm_ortho_isa(); ++isa) {
            wrong += lm_ortho_linear(isa, 1, 3, in, out, 64, 1, x.data(), x.size(), base.get(), base_bytes, nullptr, 1,
                                     blobs, &claimed_size, alphas, strides, 1, y.data(), y.size()) != 0;
            int64_t sizes[] = {3, in, out, 64, static_cast<int64_t>(x.size()), base_bytes, static_cast<int64_t>(y.size())};
            sizes[random() % 7] = hostile<int64_t>(random, 64);
            if (sizes[0] == 3 && sizes[1] == in && sizes[2] == out && sizes[3] == 64) {
                const bool same = sizes[4] == 3 * in && sizes[5] == base_bytes && sizes[6] == 3 * out;
                const int result = lm_ortho_linear(isa, 1, sizes[0], sizes[1], sizes[2], sizes[3], 1, x.data(), sizes[4],
                                                   base.get(), sizes[5], nullptr, 1, blobs, &claimed_size, alphas, strides,
                                                   1, y.data(), sizes[6]);
                wrong += same != (result == 0);
            } else if (sizes[0] != 3 || sizes[3] != 64) {
                // Shapes that agree with none of the arrays; another in_features may still fit the same panels.
                lm_ortho_linear(isa, 1, sizes[0], sizes[1], sizes[2], sizes[3], 1, x.data(), sizes[4], base.get(),
                                sizes[5], nullptr, 0, nullptr, nullptr, nullptr, nullptr, 1, y.data(), sizes[6]);
            }
        }
        std::vector<int8_t> codes(out * 64);
        std::vector<uint16_t> scales(out);
        int64_t packing[] = {static_cast<int64_t>(codes.size()), out, out, 64, 64, (out + 63) / 64 * (128 + 8 * 256)};
        Bytes panels = aligned(packing[5]);
        packing[random() % 6] = hostile<int64_t>(random, 64);
        if (packing[0] > static_cast<int64_t>(codes.size()) || packing[1] > out) continue;  // a lie nobody can see
        if (packing[5] > (out + 63) / 64 * (128 + 8 * 256)) continue;
        lm_ortho_pack_base(codes.data(), packing[0], scales.data(), packing[1], packing[2], packing[3], packing[4], 1,
                           panels.get(), packing[5]);
    }
    return wrong;
}

}  // namespace

int main(int arguments, char** values) {
    std::mt19937 random(7);
    const Shape shapes[] = {{1, 1, 8, 1, 1.0},     {65, 130, 64, 1, 0.05}, {100, 72, 8, 2, 0.3},
                            {16, 700, 128, 1, 0.01}, {130, 40, 64, 2, 0.0}, {70, 600, 64, 1, 1.0}};
    for (const Shape& shape : shapes)
        for (int64_t rows : {1, 2, 5, 6, 7, 9, 16, 17, 33, 40})
            for (int isa = 0; isa <= lm_ortho_isa(); ++isa) {
                const double error = error_of(shape, rows, isa, rows % 2 + 1, random);
                if (!(error <= 1e-5)) {
                    std::printf("%ld x %ld, %ld rows, isa %d: error %g\n", static_cast<long>(shape.out),
                                static_cast<long>(shape.in), static_cast<long>(rows), isa, error);
                    return 1;
                }
            }
    std::printf("every instruction set agrees\n");
    const int64_t cases = arguments > 1 ? std::atoll(values[1]) : 2000;
    int64_t refused[2] = {0, 0};
    const int64_t wrong = attack(cases, random, refused);
    std::printf("%ld hostile inputs: %ld matrices and %ld blobs refused, %ld wrong answers\n", static_cast<long>(cases),
                static_cast<long>(refused[0]), static_cast<long>(refused[1]), static_cast<long>(wrong));
    if (wrong) return 1;
    return 0;
}
