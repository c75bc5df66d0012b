// The multiply-add peak of this machine: chains of independent FMAs that never leave the registers.
//
//   peak THREADS SAMPLES   prints "DTYPE GFLOPS" for each dtype the loop knows on this processor

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

// Vector width, and as many accumulators as fit into the registers beside two constants: more than
// latency times throughput (4 cycles, 2 units) needs.
#if defined(__AVX512F__)
constexpr int kBytes = 64, kChains = 24;
#elif defined(__AVX__)
constexpr int kBytes = 32, kChains = 12;
#elif defined(__aarch64__)
constexpr int kBytes = 16, kChains = 24;
#else
constexpr int kBytes = 16, kChains = 12;
#endif
constexpr int kLanes = kBytes / 4;
typedef float Vec __attribute__((vector_size(kBytes)));

// Read through volatile, so that nothing can be computed at compile time.
volatile float kFactor = 0.999f;
volatile float kAddend = 0.001f;
volatile float sink;

Vec fill(float value) {
    Vec v;
    for (int i = 0; i < kLanes; ++i) v[i] = value;
    return v;
}

// Every chain tends to 1 from a start of its own: no overflow, no denormal numbers.
void fp32(long steps) {
    const Vec factor = fill(kFactor), addend = fill(kAddend);
    Vec chains[kChains];
    for (int c = 0; c < kChains; ++c) chains[c] = fill(1.0f + static_cast<float>(c));
    for (long step = 0; step < steps; ++step) {
#pragma GCC unroll 32
        for (int c = 0; c < kChains; ++c) chains[c] = chains[c] * factor + addend;
    }
    Vec sum = fill(0.0f);
    for (int c = 0; c < kChains; ++c) sum += chains[c];
    sink = sum[0];
}

#if defined(__AVX512BF16__)
void bf16(long steps) {
    const __m512bh a = _mm512_cvtne2ps_pbh(_mm512_set1_ps(kFactor), _mm512_set1_ps(kFactor));
    const __m512bh b = _mm512_cvtne2ps_pbh(_mm512_set1_ps(kAddend), _mm512_set1_ps(kAddend));
    __m512 chains[kChains];
    for (int c = 0; c < kChains; ++c) chains[c] = _mm512_set1_ps(static_cast<float>(c));
    for (long step = 0; step < steps; ++step) {
#pragma GCC unroll 32
        for (int c = 0; c < kChains; ++c) chains[c] = _mm512_dpbf16_ps(chains[c], a, b);
    }
    __m512 sum = chains[0];
    for (int c = 1; c < kChains; ++c) sum = _mm512_add_ps(sum, chains[c]);
    sink = _mm512_reduce_add_ps(sum);
}
#endif

double seconds(void (*loop)(long), int threads, long steps) {
    const auto start = std::chrono::steady_clock::now();
    std::vector<std::thread> others;
    for (int t = 1; t < threads; ++t) others.emplace_back(loop, steps);
    loop(steps);
    for (auto& other : others) other.join();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// The best of several samples of 10 to 20 ms: a peak is what the machine can do undisturbed. All
// threads are timed together, since two of them may share a core.
double gflops(void (*loop)(long), int threads, int samples, double flops_per_step) {
    long steps = 1 << 12;
    double time = seconds(loop, threads, steps);
    while (time < 0.01 && steps < (1L << 40)) {
        steps *= 2;
        time = seconds(loop, threads, steps);
    }
    for (int s = 1; s < samples; ++s) time = std::min(time, seconds(loop, threads, steps));
    return flops_per_step * static_cast<double>(steps) * threads / time * 1e-9;
}

}  // namespace

int main(int argc, char** argv) {
    const int threads = argc > 1 ? std::max(1, std::atoi(argv[1])) : 1;
    const int samples = argc > 2 ? std::max(1, std::atoi(argv[2])) : 24;
    const double lanes = kChains * kLanes;
    std::printf("fp32 %.2f\n", gflops(fp32, threads, samples, 2 * lanes));
#if defined(__AVX512BF16__)
    std::printf("bf16 %.2f\n", gflops(bf16, threads, samples, 4 * lanes));
#endif
    return 0;
}
