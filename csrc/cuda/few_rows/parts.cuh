// A tile whose K is shared by several CTAs, and the way of a finished tile to global memory.
//
// The parts of a tile leave their sums in fp32 in global memory. The last one to arrive adds them
// up in the order of the parts, whoever it is, so the bits do not depend on the order of the CTAs.
#pragma once

#include "../device/gradient.cuh"
#include "../device/sync.cuh"
#include "stream.cuh"

namespace loraxs::gpu::few_rows {

// One CTA's part of a tile. The tiles of V are those of W (D), then those of A (slices of Q).
struct Part {
    int tile, part, parts;
    float* sums;   // of all parts of this tile
    int* counter;  // of the parts that arrived
};

// Flags behind those of device/sync.cuh: [0] CTAs that delivered T; [1] slices of Q; then one per
// tile of dR, per tile of D, per slice of Q.
struct Flags {
    int *t_ready, *q_ready, *gradients, *tiles, *slices;
    __device__ explicit Flags(const Problem& p) {
        t_ready = p.flags + kFixedFlags;
        q_ready = t_ready + 1;
        gradients = q_ready + 1;
        tiles = gradients + p.dr_items / p.chunks;
        slices = tiles + p.col_tiles;
    }
};

// Sums in p.partial: those of dR, if it has chunks; of D, if it has parts; of Q, if it has parts.
template <class Tile>
__device__ Part part_of(const Problem& p, bool slice, int item) {
    constexpr int64_t kSums = Tile::kBM * Tile::kBN;
    const int parts = slice ? p.slice_parts : p.parts, tile = item / parts;
    int64_t before = p.chunks > 1 ? int64_t(p.dr_items) * (kDI * kDJ) : 0;
    if (slice && p.parts > 1) before += kSums * p.col_tiles * p.parts;
    const Flags flags(p);
    return {tile, item % parts, parts, p.partial + before + kSums * tile * parts,
            (slice ? flags.slices : flags.tiles) + tile};
}

// What there is of a tile: rows of X, and N, the last of which may be fewer than BN.
struct Extent {
    int m, n;
};

// f(two numbers of the accumulator, their place among the tile's pairs) for the rows of X and the
// warps that there are. Pairs of rows, then N: what a warp touches at once lies side by side.
template <class Tile, class F>
__device__ void for_each_pair(Accumulator<Tile>& acc, const Extent& there, F f) {
    const int lane = threadIdx.x % 32, n0 = int(threadIdx.x) / 32 * 16, n = n0 + lane / 4;
    if (n0 >= there.n) return;
#pragma unroll
    for (int block = 0; block < Tile::kBlocks; ++block) {
        const int pair = 4 * block + lane % 4;
        if (2 * pair >= there.m) break;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            f(acc[block][half], pair * Tile::kBN + n + 8 * half);
        }
    }
}

// Leaves the sums of this part. False: another part of the tile is still to come, and will finish
// it.
template <class Tile>
__device__ bool deliver(Accumulator<Tile>& acc, const Part& part, const Extent& there, int* slot) {
    if (part.parts == 1) return true;
    auto* sums = reinterpret_cast<float2*>(part.sums) + part.part * (Tile::kBM * Tile::kBN / 2);
    for_each_pair<Tile>(acc, there,
                        [&](float (&two)[2], int place) { sums[place] = {two[0], two[1]}; });
    return arrive(part.counter, slot) == part.parts - 1;
}

// acc becomes the sum over all parts, all of which have been delivered.
template <class Tile>
__device__ void add_parts(Accumulator<Tile>& acc, const Part& part, const Extent& there) {
    if (part.parts == 1) return;
    const auto* sums = reinterpret_cast<const float2*>(part.sums);
    for_each_pair<Tile>(acc, there, [](float (&two)[2], int) { two[0] = two[1] = 0.f; });
#pragma unroll(Tile::kBM <= 16 ? 4 : 2)
    for (int i = 0; i < part.parts; ++i, sums += Tile::kBM * Tile::kBN / 2) {
        for_each_pair<Tile>(acc, there, [&](float (&two)[2], int place) {
            const float2 sum = __ldcg(sums + place);
            two[0] += sum.x, two[1] += sum.y;
        });
    }
}

// Eight neighbours of a row, in fp32, and eight more.
template <class Element>
__device__ void add(float (&sum)[kVector], const Vector& more) {
    for (int i = 0; i < kVector / 2; ++i) {
        const float2 two = widen<Element>(more.pair[i]);
        sum[2 * i] += two.x, sum[2 * i + 1] += two.y;
    }
}

template <class Element>
__device__ void store_vector(Element* to, const float (&v)[kVector], int count, bool whole) {
    if (whole && count >= kVector) {
        *reinterpret_cast<Vector*>(to) = {narrow<Element>(v[0], v[1]), narrow<Element>(v[2], v[3]),
                                          narrow<Element>(v[4], v[5]), narrow<Element>(v[6], v[7])};
        return;
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
        if (i < count) to[i] = Element(v[i]);
    }
}

// The matrix that a tile goes to.
template <class Element>
struct Output {
    Element* data;
    int64_t pitch;
};

// out[:, n0 .. n0 + kBN) = C + bias + base, by way of shared memory: the accumulator has neighbours
// in N in different lanes. `bias`, `base`: may be null.
template <class Tile>
__device__ void store_tile(Accumulator<Tile>& acc, const Extent& there,
                           const Output<typename Tile::Element>& out, int n0, const void* bias,
                           const Matrix<typename Tile::Element>& base, void* shared) {
    using Element = typename Tile::Element;
    constexpr int kPitch = Tile::kBN + 4, kVectors = Tile::kBN / kVector;
    static_assert(Tile::kBM * kPitch * int(sizeof(float)) <= Tile::kStreamBytes);
    auto* tile = static_cast<float*>(shared);
    for_each_pair<Tile>(acc, there, [&](float (&two)[2], int place) {
        const int at = place / Tile::kBN * 2 * kPitch + place % Tile::kBN;
        tile[at] = two[0], tile[at + kPitch] = two[1];
    });
    __syncthreads();
    const bool whole = has_vectors(out.data, out.pitch), whole_bias = has_vectors(bias, 0);
#pragma unroll 1
    for (int e = threadIdx.x; e < there.m * kVectors; e += Tile::kThreads) {
        const int row = e / kVectors, at = e % kVectors * kVector, n = n0 + at;
        const int count = there.n - at;
        if (count <= 0) continue;
        const auto* from = reinterpret_cast<const float4*>(tile + row * kPitch + at);
        const float4 low = from[0], high = from[1];
        float v[kVector] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
        if (bias) {
            add<Element>(v, load_vector(static_cast<const Element*>(bias) + n, count, whole_bias));
        }
        if (base.data) {
            add<Element>(v, load_vector(base.data + row * base.pitch + n, count, base.vectors));
        }
        store_vector(out.data + row * out.pitch + n, v, count, whole);
    }
}

}  // namespace loraxs::gpu::few_rows
