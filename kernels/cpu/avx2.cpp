// For processors with AVX2 and FMA.
#include "generic.h"

namespace lm_ortho {
void run_avx2(const Job& job) { run_generic(job); }
}  // namespace lm_ortho
