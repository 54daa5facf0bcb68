// The indexer's scores of all entries for every query, sum_h weight_h * relu(query_h . key): kernels/compressed.py.
//
// Compiled for HEADS heads of WIDTH channels, fp32. Queries go through by the block, a thread each. A tile of keys is
// laid out by channels: a vector holds one channel of as many entries. It stays in the processor's cache while the
// block's queries pass it; a head's products, their relu and the sum over heads never leave the registers.

#include <algorithm>
#include <cstdint>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "common.h"

using torch::stable::Tensor;
using Vector = Floats<WIDEST>::type;

constexpr int TILE = 32, VECTORS = TILE / WIDEST, QUERIES = 32;
constexpr int AT_ONCE = largest_divisor(HEADS, REGISTERS / VECTORS);

// keys[c][e] of a tile's entries; behind the last one stand zeros.
void lay_out(const float* from, int64_t entries, float keys[WIDTH][TILE]) {
    for (int e = 0; e < TILE; ++e)
        for (int c = 0; c < WIDTH; ++c) keys[c][e] = e < entries ? from[e * WIDTH + c] : 0;
}

inline void score(const float* query, const float* weights, const float keys[WIDTH][TILE], float* scores) {
    const Vector nothing = {};
    Vector total[VECTORS] = {};
    for (int first = 0; first < HEADS; first += AT_ONCE) {
        Vector products[AT_ONCE][VECTORS] = {};
        for (int c = 0; c < WIDTH; ++c)
            for (int v = 0; v < VECTORS; ++v) {
                Vector key;
                std::memcpy(&key, &keys[c][v * WIDEST], sizeof key);
                for (int h = 0; h < AT_ONCE; ++h) products[h][v] += key * query[(first + h) * WIDTH + c];
            }
        for (int h = 0; h < AT_ONCE; ++h)
            for (int v = 0; v < VECTORS; ++v) {
                total[v] += larger_of(products[h][v], nothing) * weights[first + h];
            }
    }
    std::memcpy(scores, total, sizeof total);
}

// query (n, HEADS, WIDTH), weights (n, HEADS), keys (E, WIDTH) -> (n, E), everything contiguous.
Tensor index_scores(const Tensor query, const Tensor weights, const Tensor keys) {
    const int64_t count = query.size(0), entries = keys.size(0);
    Tensor scores = torch::stable::new_empty(query, {count, entries});
    const float* queries = static_cast<const float*>(query.const_data_ptr());
    const float* factors = static_cast<const float*>(weights.const_data_ptr());
    const float* all = static_cast<const float*>(keys.const_data_ptr());
    float* to = static_cast<float*>(scores.mutable_data_ptr());
#pragma omp parallel for schedule(dynamic)
    for (int64_t block = 0; block < count; block += QUERIES) {
        alignas(64) float tile[WIDTH][TILE], row[TILE];
        for (int64_t entry = 0; entry < entries; entry += TILE) {
            const int64_t there = std::min<int64_t>(TILE, entries - entry);
            lay_out(all + entry * WIDTH, there, tile);
            for (int64_t q = block; q < std::min(block + QUERIES, count); ++q) {
                score(queries + q * HEADS * WIDTH, factors + q * HEADS, tile, row);
                std::copy(row, row + there, to + q * entries + entry);
            }
        }
    }
    return scores;
}

STABLE_TORCH_LIBRARY_FRAGMENT(kvell, library) {
    library.def(NAME "(Tensor query, Tensor weights, Tensor keys) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(kvell, CPU, library) { library.impl(NAME, TORCH_BOX(&index_scores)); }
