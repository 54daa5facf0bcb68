// The indexer's choice: of every query's visible entries the k with the largest scores, of equal ones the first, with
//
//     score_j = sum_h weight_h * relu(q_h . key_j)
//
// as kernels/compressed.py has it. Compiled for HEADS heads of WIDTH channels, and keys of an ELEMENT that is float
// or, kept as uint16_t, bfloat16. All arithmetic is fp32.
//
// Scores. A block of queries shares tiles of keys, laid out by channels: a vector holds one channel of as many
// entries. A tile stays in the processor's cache while the block passes it; a head's products, their relu and the sum
// over heads never leave the registers. For a query alone that is not worth it: it is itself laid out by channels, a
// vector holds one channel of as many heads, and keys are read as they lie.
//
// Choice. What exceeds a threshold is noted, in the entries' order; when there is no more room, all but the k largest
// are forgotten and the smallest of them is the threshold from then on. A later score that equals it is not among the
// k largest: those noted stand before it. Many scores are read twice: divided into more than k groups, they have no
// fewer than k as large as the k-th of the groups' maxima, and seldom many more.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "common.h"

using Element = ELEMENT;
using torch::stable::Tensor;
using Vector = Floats<WIDEST>::type;

constexpr int TILE = 32, VECTORS = TILE / WIDEST, TOGETHER = 32;  // entries of a tile, queries of a block
constexpr int TILE_HEADS = largest_divisor(HEADS, REGISTERS / VECTORS);
constexpr int LANES = std::gcd(HEADS, WIDEST), PARTS = largest_divisor(HEADS / LANES, REGISTERS / 2);
constexpr int ROWS = REGISTERS / PARTS;
constexpr int64_t CHUNK = 1024;  // entries that are scored by one thread
constexpr int64_t MOST_QUERIES = 512, MOST_SCORES = 1 << 22;  // that are kept at once
constexpr int64_t ALONE = 1 << 17;  // so many products are not worth a second thread

constexpr float NOTHING = -std::numeric_limits<float>::infinity();
constexpr int64_t AT_ONCE = 32;  // scores that are compared before any of them is looked at
constexpr int64_t SMALLEST_GROUP = 4;

// keys[c][e] of a tile's entries; behind the last one stand zeros.
void lay_out(const Element* from, int64_t entries, float keys[WIDTH][TILE]) {
    for (int e = 0; e < TILE; ++e)
        for (int c = 0; c < WIDTH; ++c) keys[c][e] = e < entries ? widened(from[e * WIDTH + c]) : 0;
}

inline void score_tile(const float* query, const float* weights, const float keys[WIDTH][TILE], float* scores) {
    const Vector nothing = {};
    Vector total[VECTORS] = {};
    for (int first = 0; first < HEADS; first += TILE_HEADS) {
        Vector products[TILE_HEADS][VECTORS] = {};
        for (int c = 0; c < WIDTH; ++c)
            for (int v = 0; v < VECTORS; ++v) {
                const Vector key = load(&keys[c][v * WIDEST]);
                for (int h = 0; h < TILE_HEADS; ++h) products[h][v] += key * query[(first + h) * WIDTH + c];
            }
        for (int h = 0; h < TILE_HEADS; ++h)
            for (int v = 0; v < VECTORS; ++v) {
                total[v] += larger_of(products[h][v], nothing) * weights[first + h];
            }
    }
    for (Vector& own : total) own = ordered(own);
    std::memcpy(scores, total, sizeof total);
}

// The scores of as many entries; query[c][h].
template <int rows>
inline void score_rows(const float* query, const float* weights, const Element* keys, float* scores) {
    using Heads = typename Floats<LANES>::type;
    const Heads nothing = {};
    Heads total[rows] = {};
    for (int first = 0; first < HEADS; first += PARTS * LANES) {
        Heads products[rows][PARTS] = {};
        for (int c = 0; c < WIDTH; ++c)
            for (int p = 0; p < PARTS; ++p) {
                const Heads part = load<LANES>(query + c * HEADS + first + p * LANES);
                for (int r = 0; r < rows; ++r) products[r][p] += part * widened(keys[r * WIDTH + c]);
            }
        for (int r = 0; r < rows; ++r)
            for (int p = 0; p < PARTS; ++p)
                total[r] += larger_of(products[r][p], nothing) * load<LANES>(weights + first + p * LANES);
    }
    for (int r = 0; r < rows; ++r) scores[r] = ordered(sum<LANES>(total[r]));
}

// Of a query alone, query[c][h]: scores[e] of the entries [first, last).
void score_for_one(
    const float* query, const float* weights, const Element* keys, int64_t first, int64_t last, float* scores
) {
    for (; first + ROWS <= last; first += ROWS)
        score_rows<ROWS>(query, weights, keys + first * WIDTH, scores + first);
    for (; first < last; ++first) score_rows<1>(query, weights, keys + first * WIDTH, scores + first);
}

// Of a block, queries[q][h][c]: scores[q * stride + e] of the entries [first, last).
void score_for_block(
    const float* queries, const float* weights, int64_t count, const Element* keys, int64_t first, int64_t last,
    float* scores, int64_t stride
) {
    alignas(64) float tile[WIDTH][TILE], row[TILE];
    for (int64_t entry = first; entry < last; entry += TILE) {
        const int64_t there = std::min<int64_t>(TILE, last - entry);
        lay_out(keys + entry * WIDTH, there, tile);
        for (int64_t q = 0; q < count; ++q) {
            score_tile(queries + q * HEADS * WIDTH, weights + q * HEADS, tile, row);
            std::copy(row, row + there, scores + q * stride + entry);
        }
    }
}

struct Noted {
    const int64_t wanted;
    std::vector<float> scores, sorted;
    std::vector<int64_t> places;
    float threshold = NOTHING;

    explicit Noted(int64_t wanted) : wanted(wanted) {
        const int64_t room = std::max<int64_t>(4 * wanted, 64);
        for (auto* list : {&scores, &sorted}) list->reserve(room);
        places.reserve(room);
    }

    void clear() {
        scores.clear();
        places.clear();
        threshold = NOTHING;
    }

    void add(float score, int64_t place) {
        if (int64_t(scores.size()) == int64_t(scores.capacity())) forget();
        scores.push_back(score);
        places.push_back(place);
    }

    void forget() {
        if (int64_t(scores.size()) <= wanted) return;
        sorted = scores;
        std::nth_element(sorted.begin(), sorted.begin() + wanted - 1, sorted.end(), std::greater<float>());
        threshold = sorted[wanted - 1];
        int64_t equal = wanted, kept = 0;
        for (const float score : scores) equal -= score > threshold;
        for (size_t i = 0; i < scores.size(); ++i) {
            if (scores[i] < threshold || (scores[i] == threshold && --equal < 0)) continue;
            scores[kept] = scores[i];
            places[kept++] = places[i];
        }
        scores.resize(kept);
        places.resize(kept);
    }
};

// The k-th largest of groups' maxima, or NOTHING where a row is too short. AT_ONCE groups lie side by side.
float bound(const float* scores, int64_t seen, int64_t k, std::vector<float>& maxima) {
    const int64_t blocks = 2 * k / AT_ONCE + 1, size = seen / (blocks * AT_ONCE);
    if (size < SMALLEST_GROUP) return NOTHING;
    maxima.assign(blocks * AT_ONCE, NOTHING);
    for (int64_t block = 0; block < blocks; ++block) {
        float* largest = &maxima[block * AT_ONCE];
        for (int64_t member = 0; member < size; ++member, scores += AT_ONCE) {
            for (int64_t i = 0; i < AT_ONCE; i += WIDEST) {
                const Vector larger = larger_of(load(largest + i), load(scores + i));
                std::memcpy(largest + i, &larger, sizeof larger);
            }
        }
    }
    std::nth_element(maxima.begin(), maxima.begin() + k - 1, maxima.end(), std::greater<float>());
    return maxima[k - 1];
}

void choose(const float* scores, int64_t seen, Noted& noted, int64_t* picks) {
    noted.clear();
    if (seen == 0 || noted.wanted == 0) {
        std::fill(picks, picks + noted.wanted, -1);
        return;
    }
    int64_t at = 0;
    const float least = bound(scores, seen, noted.wanted, noted.sorted);
    if (least > NOTHING) {
        // Below zero the next number is one that processors may be told to take for zero.
        noted.threshold = least == 0 ? -std::numeric_limits<float>::min() : std::nextafter(least, NOTHING);
    } else {
        for (; at < std::min(noted.wanted, seen); ++at) noted.add(scores[at], at);
        noted.threshold = *std::min_element(noted.scores.begin(), noted.scores.end());
    }
    for (; at + AT_ONCE <= seen; at += AT_ONCE) {
        Vector largest = Vector{} + noted.threshold;
        for (int64_t i = 0; i < AT_ONCE; i += WIDEST) largest = larger_of(largest, load(scores + at + i));
        if (!(maximum<WIDEST>(largest) > noted.threshold)) continue;
        for (int64_t i = at; i < at + AT_ONCE; ++i)
            if (scores[i] > noted.threshold) noted.add(scores[i], i);
    }
    for (; at < seen; ++at)
        if (scores[at] > noted.threshold) noted.add(scores[at], at);
    noted.forget();
    std::copy(noted.places.begin(), noted.places.end(), picks);
    std::fill(picks + noted.places.size(), picks + noted.wanted, -1);
}

// query (n, HEADS, WIDTH) and weights (n, HEADS) in fp32, keys (E, WIDTH), visible (n), everything contiguous: picks
// (n, k), ascending, then -1.
Tensor pick(const Tensor query, const Tensor weights, const Tensor keys, const Tensor visible, int64_t k) {
    const int64_t count = query.size(0), entries = keys.size(0);
    Tensor picks = torch::stable::new_empty(visible, {count, k});
    const Element* all = static_cast<const Element*>(keys.const_data_ptr());
    const int64_t* seen = static_cast<const int64_t*>(visible.const_data_ptr());
    int64_t* to = static_cast<int64_t*>(picks.mutable_data_ptr());
    const float* queries = static_cast<const float*>(query.const_data_ptr());
    const float* shares = static_cast<const float*>(weights.const_data_ptr());
    std::vector<float> by_channels(count == 1 ? HEADS * WIDTH : 0);
    for (size_t i = 0; i < by_channels.size(); ++i) by_channels[i] = queries[i % HEADS * WIDTH + i / HEADS];
    const int64_t room = std::clamp<int64_t>(MOST_SCORES / std::max<int64_t>(entries, 1), 1, MOST_QUERIES);
    const std::unique_ptr<float[]> scores(new float[std::min(room, count) * entries]);
#pragma omp parallel if (count * entries * HEADS * WIDTH > ALONE)
    {
        Noted noted(k);
        for (int64_t first = 0; first < count; first += room) {
            const int64_t stop = std::min(first + room, count);
            const int64_t most = std::clamp<int64_t>(*std::max_element(seen + first, seen + stop), 0, entries);
            const int64_t chunks = (most + CHUNK - 1) / CHUNK, blocks = (stop - first + TOGETHER - 1) / TOGETHER;
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < blocks * chunks; ++task) {
                const int64_t from = first + task / chunks * TOGETHER, entry = task % chunks * CHUNK;
                const int64_t last = std::min(entry + CHUNK, most), block = std::min<int64_t>(TOGETHER, stop - from);
                float* own = scores.get() + (from - first) * entries;
                if (count == 1) {
                    score_for_one(by_channels.data(), shares, all, entry, last, own);
                } else {
                    const float *ask = queries + from * HEADS * WIDTH, *share = shares + from * HEADS;
                    score_for_block(ask, share, block, all, entry, last, own, entries);
                }
            }
#pragma omp for schedule(dynamic, 8)
            for (int64_t q = first; q < stop; ++q) {
                const int64_t among = std::clamp<int64_t>(seen[q], 0, entries);
                choose(scores.get() + (q - first) * entries, among, noted, to + q * k);
            }
        }
    }
    return picks;
}

STABLE_TORCH_LIBRARY_FRAGMENT(kvell, library) {
    library.def(NAME "(Tensor query, Tensor weights, Tensor keys, Tensor visible, int k) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(kvell, CPU, library) { library.impl(NAME, TORCH_BOX(&pick)); }
