// Threads of the OpenMP runtime that the process has loaded (that of torch), else of the standard library.
#include "dual_stream.h"

#include <cstdlib>
#include <new>
#include <thread>
#include <vector>

#if defined(__unix__)
#include <dlfcn.h>
#endif

namespace lm_ortho {
namespace {

// The entry point that GCC calls for `#pragma omp parallel`; runtimes of LLVM and Intel have it, too. A second
// runtime of our own would compete with torch's for the cores: their waiting threads spin.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using GompNumber = int (*)();

struct OpenMp {
    GompParallel parallel = nullptr;
    GompNumber worker = nullptr, workers = nullptr;
    OpenMp() {
#if defined(__unix__)
        parallel = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
        worker = reinterpret_cast<GompNumber>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
        workers = reinterpret_cast<GompNumber>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
#endif
    }
    bool there() const { return parallel && worker && workers; }
};

const OpenMp& openmp() {
    static const OpenMp found;
    return found;
}

struct Region {
    void (*body)(void*, int, int);
    void* context;
};

void in_openmp(void* data) {
    const auto* region = static_cast<Region*>(data);
    region->body(region->context, openmp().worker(), openmp().workers());
}

}  // namespace

void parallel(int threads, void (*body)(void*, int, int), void* context) {
    if (threads <= 1) return body(context, 0, 1);
    if (openmp().there()) {
        Region region{body, context};
        return openmp().parallel(in_openmp, &region, static_cast<unsigned>(threads), 0);
    }
    std::vector<std::thread> others;
    for (int worker = 1; worker < threads; ++worker) others.emplace_back(body, context, worker, threads);
    body(context, 0, threads);
    for (auto& other : others) other.join();
}

Buffer::Buffer(size_t bytes) : data_(nullptr) {
    // Whole cache lines, and one more: nothing that a vector reads lies outside.
    data_ = std::aligned_alloc(64, (bytes + 127) / 64 * 64);
    if (data_ == nullptr) throw std::bad_alloc();
}

Buffer::~Buffer() { std::free(data_); }

}  // namespace lm_ortho
