// The product for any processor (generic.h).
#include "generic.h"

namespace lm_ortho {
void run_scalar(const Job& job) { run_generic(job); }
}  // namespace lm_ortho
