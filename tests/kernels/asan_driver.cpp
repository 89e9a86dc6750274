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
                    int planes, const uint16_t* x, const uint8_t* base, const float* bias, int n_terms,
                    const uint8_t* const* sheets, const float* const* alphas, const int64_t* strides, int y_float,
                    void* y);
void lm_ortho_pack_base(const int8_t* codes, const uint16_t* scales, int64_t rows, int64_t width, int64_t group,
                        int planes, uint8_t* out);
void* lm_ortho_make_sheets(const void* rowptr, int wide, const int32_t* cols, const uint16_t* vals, int64_t rows,
                           int64_t* bytes);
void lm_ortho_take_sheets(void* made, uint8_t* out);
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
    const Bytes base = aligned(panels * groups * (128 + s.planes * s.group / 8 * 256));
    lm_ortho_pack_base(codes.data(), scales.data(), s.out, width, s.group, s.planes, base.get());
    int64_t size = 0;
    void* made = lm_ortho_make_sheets(rowptr.data(), 0, cols.data(), vals.data(), s.out, &size);
    const Bytes sheets = aligned(size);
    lm_ortho_take_sheets(made, sheets.get());
    const uint8_t* blobs[] = {sheets.get()};
    const float* alphas[] = {alpha.data()};
    const int64_t strides[] = {rows > 1 ? 1 : 0};
    if (lm_ortho_linear(isa, threads, rows, s.in, s.out, s.group, s.planes, x.data(), base.get(), bias.data(), 1, blobs,
                        alphas, strides, 1, y.data()))
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

}  // namespace

int main() {
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
    return 0;
}
