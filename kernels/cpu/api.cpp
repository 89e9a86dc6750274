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
LM_ORTHO_API int lm_ortho_abi() { return 2; }

// The widest instruction set of this processor: 0 scalar, 1 AVX2, 2 AVX-512 with BF16.
LM_ORTHO_API int lm_ortho_isa() { return has(AVX512_BF16) ? AVX512_BF16 : has(AVX2) ? AVX2 : SCALAR; }

// y (rows, out_features) = x (rows, in_features) times the matrix of `base` and of `sheets`, one blob for each of the
// n_terms ortho streams; alphas[j] has one number (strides[j] = 0) or one per row (1). All arrays are contiguous and
// `base` is aligned to 64 bytes. bias is float32 or null; y is BF16, or float32 when y_float.
// Returns 0; 1 if the processor lacks the instruction set; 2 if memory ran out.
LM_ORTHO_API int lm_ortho_linear(int isa, int threads, int64_t rows, int64_t in_features, int64_t out_features, int64_t group,
                    int planes, const uint16_t* x, const uint8_t* base, const float* bias, int n_terms,
                    const uint8_t* const* sheets, const float* const* alphas, const int64_t* strides, int y_float,
                    void* y) {
    if (!has(static_cast<Isa>(isa))) return 1;
    try {
        std::vector<Term> terms;
        for (int t = 0; t < n_terms; ++t) terms.push_back({view_sheets(sheets[t]), alphas[t], strides[t]});
        Job job{rows,  in_features,  out_features, group, (in_features + group - 1) / group, planes, x, base, bias,
                terms.data(), n_terms, y, y_float != 0, threads};
        runner(static_cast<Isa>(isa))(job);
    } catch (const std::exception&) {
        return 2;
    }
    return 0;
}

// The constant arguments of a product: those of lm_ortho_linear except threads, rows, x and y.
struct LmOrthoLayer {
    int32_t isa, planes, n_terms, y_float;
    int64_t in_features, out_features, group;
    const uint8_t* base;
    const float* bias;
    const uint8_t* const* sheets;
    const float* const* alphas;
    const int64_t* strides;
};

LM_ORTHO_API int lm_ortho_layer(const LmOrthoLayer* layer, int threads, int64_t rows, const uint16_t* x, void* y) {
    return lm_ortho_linear(layer->isa, threads, rows, layer->in_features, layer->out_features, layer->group, layer->planes,
                           x, layer->base, layer->bias, layer->n_terms, layer->sheets, layer->alphas, layer->strides,
                           layer->y_float, y);
}

}  // extern "C"
