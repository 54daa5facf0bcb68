// Causal attention of a sequence's newest tokens over its rows, in full or within a window; see kernels/attention.py.
//
// Compiled for heads of WIDTH channels and GROUP query heads for each KV head, an ELEMENT that is float or, kept as
// uint16_t, bfloat16. All arithmetic is fp32. The queries of a block, each with all heads of its group, pass the rows
// that they may see tile by tile, in a streaming softmax (Milakov and Gimelshein 2018, arXiv 1805.02867; Dao et al.
// 2022, arXiv 2205.14135). Queries lie across: a vector holds one number of as many of them, so a softmax is a sum of
// vectors, and keys and values are multiplied as they lie.

#include <algorithm>
#include <cstdint>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "common.h"

using Element = ELEMENT;
using torch::stable::Tensor;
using Vector = Floats<WIDEST>::type;

// Keys and values at once, few enough for the nearest caches. In a small window most tiles are seen only in part, and
// what is hidden was computed in vain: smaller tiles.
constexpr int TILE = 64, SMALL_TILE = 32, SMALL_WINDOW = 1024;
constexpr int ACROSS = 2 * WIDEST;                       // queries, each with its heads, side by side in a panel
constexpr int AT_ONCE = REGISTERS / 2;                   // rows of a product whose sums stay in registers
constexpr int PANELS = std::clamp(4096 / WIDTH, 8, 32);
constexpr int BLOCK = std::max(PANELS * ACROSS / GROUP, 1);  // queries, for which a tile is read once

// The numbers of a query stand one below the other.
struct Panel {
    float query[WIDTH][ACROSS], output[WIDTH][ACROSS];
    Vector largest[2], total[2];
    int64_t first, last;          // where the first and the last query stand
    uint32_t after_first[ACROSS];  // how far after the first each does
};

// c[r] = fade * c[r] + sum_k a(r, k) * b[k], a row of ACROSS numbers each, for r < rows.
template <int rows, int depth, class A>
inline void product(A a, const float (*b)[ACROSS], const Vector* fade, float (*c)[ACROSS]) {
    constexpr int some = largest_divisor(rows, AT_ONCE);
    for (int first = 0; first < rows; first += some) {
        Vector sums[some][2];
        for (int r = 0; r < some; ++r)
            for (int v = 0; v < 2; ++v) sums[r][v] = fade ? load(c[first + r] + v * WIDEST) * fade[v] : Vector{};
        for (int k = 0; k < depth; ++k)
            for (int v = 0; v < 2; ++v) {
                const Vector row = load(b[k] + v * WIDEST);
                for (int r = 0; r < some; ++r) sums[r][v] += row * a(first + r, k);
            }
        for (int r = 0; r < some; ++r) std::memcpy(c[first + r], sums[r], sizeof sums[r]);
    }
}

// The next rows, in fp32; where no more are there, zeros.
template <int rows> void copy_rows(const Element* from, int64_t stride, int64_t there, float (*to)[WIDTH]) {
    for (int64_t i = 0; i < rows; ++i)
        if (i >= there) std::memset(to[i], 0, sizeof to[i]);
        else widen<WIDTH>(from + i * stride, to[i]);
}

// Scores of rows from `tile` on that a query does not see, because they lie behind it or before its window, count for
// nothing.
template <int rows> void hide(const Panel& panel, int64_t tile, int64_t window, float (*scores)[ACROSS]) {
    using Distances = uint32_t __attribute__((vector_size(4 * WIDEST)));
    const uint32_t limit = std::min<int64_t>(window, 1 << 30);  // caches are shorter
    const Vector hidden = Vector{} + 2 * LOWEST;
    for (int v = 0; v < 2; ++v) {
        Distances distance;  // from the row to each query; of what lies behind it a number beyond every window
        std::memcpy(&distance, panel.after_first + v * WIDEST, sizeof distance);
        distance += uint32_t(panel.first - tile);
        for (int i = 0; i < rows; ++i, distance -= 1) {
            const Vector score = distance < limit ? load(scores[i] + v * WIDEST) : hidden;
            std::memcpy(scores[i] + v * WIDEST, &score, sizeof score);
        }
    }
}

// A panel's queries and `rows` rows from `tile` on, of which each sees those that it may, or `all`.
template <int rows>
void pass(
    Panel& panel, const float (*keys)[WIDTH], const float (*values)[WIDTH], int64_t tile, bool all, int64_t window
) {
    float scores[rows][ACROSS];
    product<rows, WIDTH>([&](int i, int c) { return keys[i][c]; }, panel.query, nullptr, scores);
    if (!all) hide<rows>(panel, tile, window, scores);
    Vector fade[2];
    for (int v = 0; v < 2; ++v) {
        Vector larger = panel.largest[v], added = {};
        for (int i = 0; i < rows; ++i) larger = larger_of(larger, load(scores[i] + v * WIDEST));
        for (int i = 0; i < rows; ++i) {
            const Vector weight = power_of_two<WIDEST>(load(scores[i] + v * WIDEST) - larger);
            added += weight;
            std::memcpy(scores[i] + v * WIDEST, &weight, sizeof weight);
        }
        fade[v] = power_of_two<WIDEST>(panel.largest[v] - larger);
        panel.largest[v] = larger;
        panel.total[v] = panel.total[v] * fade[v] + added;
    }
    product<WIDTH, rows>([&](int c, int i) { return values[i][c]; }, scores, fade, panel.output);
}

// Where the numbers of one KV head and of its queries begin, and how far the next row's are.
struct Head {
    const Element *query, *keys, *values;
    Element* output;
    int64_t query_stride, key_stride, value_stride;
};

// Queries [first, last), of which the first stands at row `position`, and `rows` rows at once.
template <int rows>
void attend(
    const Head& head, int64_t first, int64_t last, int64_t position, int64_t window, float scale,
    std::vector<Panel>& panels
) {
    const int64_t count = (last - first) * GROUP, used = (count + ACROSS - 1) / ACROSS;
    const auto place = [&](int64_t row) { return (first + row / GROUP) * head.query_stride + row % GROUP * WIDTH; };
    for (int64_t p = 0; p < used; ++p)
        for (int v = 0; v < 2; ++v) panels[p].largest[v] = Vector{} + LOWEST, panels[p].total[v] = Vector{};
    for (int64_t row = 0; row < used * ACROSS; ++row) {
        Panel& panel = panels[row / ACROSS];
        const int64_t q = row % ACROSS;
        // Behind the last query stands the last query.
        const int64_t own = std::min(row, count - 1);
        if (q == 0) panel.first = position + own / GROUP;
        panel.last = position + own / GROUP;
        panel.after_first[q] = panel.last - panel.first;
        for (int c = 0; c < WIDTH; ++c) {
            panel.query[c][q] = widened(head.query[place(own) + c]) * scale;
            panel.output[c][q] = 0;
        }
    }

    float keys[rows][WIDTH], values[rows][WIDTH];
    const int64_t end = position + last - first;
    for (int64_t tile = std::max<int64_t>(position - window + 1, 0); tile < end; tile += rows) {
        copy_rows<rows>(head.keys + tile * head.key_stride, head.key_stride, end - tile, keys);
        copy_rows<rows>(head.values + tile * head.value_stride, head.value_stride, end - tile, values);
        for (int64_t p = 0; p < used; ++p) {
            Panel& panel = panels[p];
            if (tile > panel.last || tile + rows <= panel.first - window + 1) continue;
            const bool all = tile + rows <= panel.first + 1 && tile > panel.last - window;
            pass<rows>(panel, keys, values, tile, all, window);
        }
    }
    for (int64_t row = 0; row < count; ++row) {
        const Panel& panel = panels[row / ACROSS];
        const int64_t q = row % ACROSS;
        const float total = panel.total[q / WIDEST][q % WIDEST];
        for (int c = 0; c < WIDTH; ++c) write(panel.output[c][q] / total, head.output + place(row) + c);
    }
}

// query (n, K * GROUP, WIDTH), contiguous; keys and values (S, K, WIDTH), a row's heads side by side -> as query.
Tensor attention(const Tensor query, const Tensor keys, const Tensor values, double scale, int64_t window) {
    Tensor output = torch::stable::empty_like(query);
    const int64_t count = query.size(0), kv_heads = keys.size(1), past = keys.size(0) - count;
    const int64_t blocks = (count + BLOCK - 1) / BLOCK;
#pragma omp parallel
    {
        std::vector<Panel> panels((BLOCK * GROUP + ACROSS - 1) / ACROSS);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < blocks * kv_heads; ++task) {
            const int64_t own = task % kv_heads, block = blocks - 1 - task / kv_heads;  // what sees most first
            const Head head{
                static_cast<const Element*>(query.const_data_ptr()) + own * GROUP * WIDTH,
                static_cast<const Element*>(keys.const_data_ptr()) + own * WIDTH,
                static_cast<const Element*>(values.const_data_ptr()) + own * WIDTH,
                static_cast<Element*>(output.mutable_data_ptr()) + own * GROUP * WIDTH,
                query.stride(0), keys.stride(0), values.stride(0)};
            const int64_t first = block * BLOCK, last = std::min(first + BLOCK, count);
            const auto run = window < SMALL_WINDOW ? attend<SMALL_TILE> : attend<TILE>;
            run(head, first, last, past + first, window, float(scale) * LOG2_E, panels);
        }
    }
    return output;
}

STABLE_TORCH_LIBRARY_FRAGMENT(kvell, library) {
    library.def(NAME "(Tensor query, Tensor keys, Tensor values, float scale, int window) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(kvell, CPU, library) { library.impl(NAME, TORCH_BOX(&attention)); }
