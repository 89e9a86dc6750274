// Times ggml's product with repacked Q4_0 weights and ours in turns, without Python: benchmarks/ggml.py builds and runs it.
//     ggml_peer LIBRARY OUT_FEATURES IN_FEATURES ROUNDS BATCH...
// One thread, in the time it ran. Every variant has copies of its weights that no cache holds together, and of two calls
// with different copies the second is timed. Prints one JSON object.
#include <dlfcn.h>
#include <time.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

namespace {

constexpr int COPIES = 12, GROUP = 64;

double seconds() {
    timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return now.tv_sec + 1e-9 * now.tv_nsec;
}

void fail(const std::string& what) {
    std::fprintf(stderr, "ggml_peer: %s\n", what.c_str());
    std::exit(1);
}

uint16_t bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return static_cast<uint16_t>(bits >> 16);
}

// The functions of kernels/cpu that this program calls, as api.cpp and pack.cpp declare them.
struct Ours {
    int (*isa)();
    int (*linear)(int, int, int64_t, int64_t, int64_t, int64_t, int, const uint16_t*, const uint8_t*, const float*, int,
                  const uint8_t* const*, const float* const*, const int64_t*, int, void*);
    void (*pack_base)(const int8_t*, const uint16_t*, int64_t, int64_t, int64_t, int, uint8_t*);
    void* (*make_sheets)(const void*, int, const int32_t*, const uint16_t*, int64_t, int64_t*);
    void (*take_sheets)(void*, uint8_t*);

    explicit Ours(const char* path) {
        void* library = dlopen(path, RTLD_NOW);
        if (!library) fail(dlerror());
        find(library, "lm_ortho_isa", isa);
        find(library, "lm_ortho_linear", linear);
        find(library, "lm_ortho_pack_base", pack_base);
        find(library, "lm_ortho_make_sheets", make_sheets);
        find(library, "lm_ortho_take_sheets", take_sheets);
    }
    template <class F> static void find(void* library, const char* name, F& function) {
        function = reinterpret_cast<F>(dlsym(library, name));
        if (!function) fail(std::string("the library has no ") + name);
    }
};

uint8_t* aligned(size_t bytes) { return static_cast<uint8_t*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)); }

// A layer of ours: one base, and a support of 1 %.
struct Layer {
    uint8_t *base, *sheets;
    Layer(const Ours& ours, int64_t out, int64_t in, std::mt19937& random) {
        std::vector<int8_t> codes(out * in);
        std::vector<uint16_t> scales(out * (in / GROUP), bf16(0.01f)), vals;
        std::vector<int32_t> rowptr{0}, cols;
        for (auto& code : codes) code = static_cast<int8_t>(random() % 16) - 8;
        for (int64_t row = 0; row < out; ++row) {
            for (int64_t column = 0; column < in; ++column)
                if (random() % 100 == 0) cols.push_back(static_cast<int32_t>(column)), vals.push_back(bf16(0.02f));
            rowptr.push_back(static_cast<int32_t>(cols.size()));
        }
        base = aligned(out / 64 * (in / GROUP) * (128 + GROUP / 8 * 256));
        ours.pack_base(codes.data(), scales.data(), out, in, GROUP, 1, base);
        int64_t size = 0;
        void* made = ours.make_sheets(rowptr.data(), 0, cols.data(), vals.data(), out, &size);
        sheets = aligned(size);
        ours.take_sheets(made, sheets);
    }
};

// The buffer type in which ggml rearranges Q4_0 weights for its fastest kernels.
ggml_backend_buffer_type_t repacking() {
    ggml_backend_dev_t device = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    auto extra = reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(
        ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(device), "ggml_backend_dev_get_extra_bufts"));
    for (auto* found = extra ? extra(device) : nullptr; found && *found; ++found)
        if (std::string(ggml_backend_buft_name(*found)).find("REPACK") != std::string::npos) return *found;
    fail("this build of ggml has no repacking buffer type");
    return nullptr;
}

ggml_context* context(size_t tensors) {
    return ggml_init({tensors * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true});
}

struct Peer {
    ggml_backend_t backend = ggml_backend_cpu_init();
    std::vector<ggml_tensor*> weights;
    Peer(int64_t out, int64_t in, std::mt19937& random) {
        ggml_backend_cpu_set_n_threads(backend, 1);
        for (int copy = 0; copy < COPIES; ++copy) {
            ggml_context* own = context(1);
            ggml_tensor* weight = ggml_new_tensor_2d(own, GGML_TYPE_Q4_0, in, out);
            if (!ggml_backend_alloc_ctx_tensors_from_buft(own, repacking())) fail("ggml: out of memory");
            std::vector<uint8_t> data(ggml_nbytes(weight));
            for (size_t at = 0; at < data.size(); at += 18) {  // a block: an FP16 scale, 32 codes
                data[at] = 0, data[at + 1] = 0x20;
                for (int i = 2; i < 18; ++i) data[at + i] = static_cast<uint8_t>(random());
            }
            ggml_backend_tensor_set(weight, data.data(), 0, data.size());
            weights.push_back(weight);
        }
    }
    // A graph for each copy.
    std::vector<ggml_cgraph*> products(int64_t in, int64_t batch) const {
        std::vector<ggml_cgraph*> made;
        for (ggml_tensor* weight : weights) {
            ggml_context* own = context(4);
            ggml_tensor* x = ggml_new_tensor_2d(own, GGML_TYPE_F32, in, batch);
            ggml_cgraph* graph = ggml_new_graph(own);
            ggml_build_forward_expand(graph, ggml_mul_mat(own, weight, x));
            if (!ggml_backend_alloc_ctx_tensors(own, backend)) fail("ggml: out of memory");
            std::vector<float> values(in * batch, 0.5f);
            ggml_backend_tensor_set(x, values.data(), 0, 4 * values.size());
            made.push_back(graph);
        }
        return made;
    }
};

double median(std::vector<double> values) {
    std::sort(values.begin(), values.end());
    return values[values.size() / 2];
}

}  // namespace

int main(int count, char** given) {
    if (count < 6) fail("usage: ggml_peer LIBRARY OUT_FEATURES IN_FEATURES ROUNDS BATCH...");
    const Ours ours(given[1]);
    const int64_t out = std::atoll(given[2]), in = std::atoll(given[3]);
    const int rounds = std::atoi(given[4]);
    if (out < 64 || in < 64 || out % 64 || in % 64 || rounds < 1) fail("sizes must be multiples of 64");
    std::mt19937 random(0);
    std::vector<Layer> layers;
    for (int copy = 0; copy < COPIES; ++copy) layers.emplace_back(ours, out, in, random);
    const Peer peer(out, in, random);
    std::printf("{\"shape\": [%ld, %ld], \"isa\": %d, \"buffer\": \"%s\", \"rows\": [", (long)out, (long)in, ours.isa(),
                ggml_backend_buft_name(repacking()));
    for (int at = 5; at < count; ++at) {
        const int64_t batch = std::atoll(given[at]);
        std::vector<uint16_t> x(batch * in, bf16(0.5f)), y(batch * out);
        const auto graphs = peer.products(in, batch);
        const float one = 1.0f;
        const float* alphas[] = {&one};
        const int64_t strides[] = {0};
        const auto own = [&](int copy, int terms) {
            const uint8_t* sheets[] = {layers[copy].sheets};
            if (ours.linear(ours.isa(), 1, batch, in, out, GROUP, 1, x.data(), layers[copy].base, nullptr, terms, sheets,
                            alphas, strides, 0, y.data()))
                fail("our kernel failed");
        };
        const std::function<void(int)> calls[] = {
            [&](int copy) { own(copy, 0); },
            [&](int copy) { own(copy, 1); },
            [&](int copy) { ggml_backend_graph_compute(peer.backend, graphs[copy]); },
        };
        std::vector<double> taken[3];
        for (int round = 0; round < rounds; ++round)
            for (int turn = 0; turn < 3; ++turn) {
                const int which = (turn + round) % 3;
                calls[which](2 * round % COPIES);
                const double start = seconds();
                calls[which]((2 * round + 1) % COPIES);
                taken[which].push_back(seconds() - start);
            }
        std::printf("%s{\"batch\": %ld, \"alpha0_us\": %.1f, \"density1_us\": %.1f, \"ggml_q4_0_us\": %.1f}", at > 5 ? ", " : "",
                    (long)batch, 1e6 * median(taken[0]), 1e6 * median(taken[1]), 1e6 * median(taken[2]));
        std::fflush(stdout);
    }
    std::printf("]}\n");
    return 0;
}
