// Entry points for Python: the available instruction sets, and the product.
#include "dual_stream.h"

#include <exception>
#include <vector>

using namespace lm_ortho;

namespace {

enum Isa { SCALAR = 0, AVX2 = 1, AVX512_BF16 = 2 };

using Run = void (*)(const Job&);

#if defined(LM_ORTHO_X86)
bool has(Isa isa) {
    if (isa == AVX2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (isa == AVX512_BF16)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16");
    return true;
}
Run runner(Isa isa) { return isa == AVX512_BF16 ? run_avx512 : isa == AVX2 ? run_avx2 : run_scalar; }
#else
bool has(Isa isa) { return isa == SCALAR; }
Run runner(Isa) { return run_scalar; }
#endif

}  // namespace

extern "C" {

// Grows when a signature or a layout changes.
LM_ORTHO_API int lm_ortho_abi() { return 3; }

// The widest instruction set of this processor: 0 scalar, 1 AVX2, 2 AVX-512 with BF16.
LM_ORTHO_API int lm_ortho_isa() { return has(AVX512_BF16) ? AVX512_BF16 : has(AVX2) ? AVX2 : SCALAR; }

// y (rows, out_features) = x (rows, in_features) times the matrix of `base` and of `sheets`, one blob for each of the
// n_terms ortho streams, which lm_ortho_check_sheets has accepted; alphas[j] has one number (strides[j] = 0) or one per
// row (1). All arrays are contiguous, `base` and the sheets are aligned to 64 bytes. bias is float32 or null; y is BF16,
// or float32 when y_float. x_values, base_bytes, sheet_bytes[j] and y_values are the sizes of the arrays.
// Returns a Status.
LM_ORTHO_API int lm_ortho_linear(int isa, int threads, int64_t rows, int64_t in_features, int64_t out_features,
                                 int64_t group, int planes, const uint16_t* x, int64_t x_values, const uint8_t* base,
                                 int64_t base_bytes, const float* bias, int n_terms, const uint8_t* const* sheets,
                                 const int64_t* sheet_bytes, const float* const* alphas, const int64_t* strides,
                                 int y_float, void* y, int64_t y_values) {
    if (isa < SCALAR || isa > AVX512_BF16 || !has(static_cast<Isa>(isa))) return NO_ISA;
    int64_t expected;
    if (!panels_bytes(out_features, in_features, group, planes, &expected) || base_bytes != expected) return BAD_SIZE;
    if (base == nullptr || reinterpret_cast<uintptr_t>(base) % 64 != 0) return BAD_SIZE;
    if (!multiply(rows, in_features, &expected) || x_values != expected) return BAD_SIZE;
    if (!multiply(rows, out_features, &expected) || y_values != expected) return BAD_SIZE;
    if (n_terms < 0 || (n_terms > 0 && (!sheets || !sheet_bytes || !alphas || !strides))) return BAD_SIZE;
    if (rows == 0) return OK;
    if (x == nullptr || y == nullptr) return BAD_SIZE;
    try {
        std::vector<Term> terms;
        for (int t = 0; t < n_terms; ++t) {
            Sheets view;
            if (!view_sheets(sheets[t], sheet_bytes[t], (out_features + PANEL - 1) / PANEL, &view)) return BAD_SHEETS;
            if (alphas[t] == nullptr || (strides[t] != 0 && strides[t] != 1)) return BAD_SIZE;
            terms.push_back({view, alphas[t], strides[t]});
        }
        Job job{rows,  in_features,  out_features, group, (in_features + group - 1) / group, planes, x, base, bias,
                terms.data(), n_terms, y, y_float != 0, threads};
        runner(static_cast<Isa>(isa))(job);
    } catch (const std::exception&) {
        return NO_MEMORY;
    }
    return OK;
}

// The constant arguments of a product: those of lm_ortho_linear except threads, x and y.
struct LmOrthoLayer {
    int32_t isa, planes, n_terms, y_float;
    int64_t rows, in_features, out_features, group, base_bytes, y_values;
    const uint8_t* base;
    const float* bias;
    const uint8_t* const* sheets;
    const int64_t* sheet_bytes;
    const float* const* alphas;
    const int64_t* strides;
};

LM_ORTHO_API int lm_ortho_layer(const LmOrthoLayer* layer, int threads, const uint16_t* x, int64_t x_values, void* y) {
    return lm_ortho_linear(layer->isa, threads, layer->rows, layer->in_features, layer->out_features, layer->group, layer->planes,
                           x, x_values, layer->base, layer->base_bytes, layer->bias, layer->n_terms, layer->sheets,
                           layer->sheet_bytes, layer->alphas, layer->strides, layer->y_float, y, layer->y_values);
}

}  // extern "C"
