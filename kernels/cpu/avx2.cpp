// The product for processors with AVX2 and FMA (generic.h).
#include "generic.h"

namespace lm_ortho {
void run_avx2(const Job& job) { run_generic(job); }
}  // namespace lm_ortho
