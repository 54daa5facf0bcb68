// Attention of one new token per sequence over the rows that each sequence holds; see decode.py.
//
// Compiled for heads of WIDTH channels and GROUP query heads for each KV head, an ELEMENT that is float or, kept as
// uint16_t, bfloat16. All arithmetic is fp32. A slice of a sequence's rows goes through in blocks, in a streaming
// softmax (Milakov and Gimelshein 2018, arXiv 1805.02867). Reading takes longer than computing: while one half of a
// block is worked on, its keys or its values, the half that comes next is fetched.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <optional>
#include <vector>

#include <omp.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "common.h"

using Element = ELEMENT;
using torch::stable::Tensor;

constexpr int LANES = std::gcd(WIDTH, WIDEST), VECTORS = WIDTH / LANES, BLOCK = 64;
using Vector = Floats<LANES>::type;
// A slice has at least so many bytes of keys: below, another thread gains nothing.
constexpr int64_t SMALLEST_SLICE = 1 << 17;
// So many slices a thread: one that is held up leaves the rest to the others.
constexpr int64_t SLICES = 4;

// Query heads that read a key at once, and vectors of a value's row that are added to all of a group's at once.
constexpr int HEADS = largest_divisor(GROUP, REGISTERS / 2);
constexpr int TILE = largest_divisor(VECTORS, REGISTERS / GROUP);

// One head's rows: where the first begins, and how many elements further the next one does.
struct Rows {
    const Element* first;
    int64_t stride;
    const Element* operator[](int64_t number) const { return first + number * stride; }
    void fetch(int64_t number, int channel, int channels) const {
        const char* from = reinterpret_cast<const char*>((*this)[number] + channel);
        for (size_t byte = 0; byte < channels * sizeof(Element); byte += 64) __builtin_prefetch(from + byte);
    }
};

// scores[g][i] = scale * query_g . key_i
inline void score(const float* query, Rows keys, Rows next, int count, float scale, float scores[][BLOCK]) {
    for (int i = 0; i < count; ++i) {
        next.fetch(i, 0, WIDTH);
        const Element* key = keys[i];
        for (int first = 0; first < GROUP; first += HEADS) {
            Vector products[HEADS] = {};
            for (int v = 0; v < VECTORS; ++v) {
                const Vector part = loaded<LANES>(key + v * LANES);
                const float* own = query + first * WIDTH + v * LANES;
                for (int g = 0; g < HEADS; ++g) products[g] += part * load<LANES>(own + g * WIDTH);
            }
            for (int g = 0; g < HEADS; ++g) scores[first + g][i] = sum<LANES>(products[g]) * scale;
        }
    }
}

// Scores, in units of a doubling, become weights, relative to the largest score so far; returns what earlier weights
// are worth by now.
inline float weigh(float* scores, int count, float& largest, float& total) {
    std::fill(scores + count, scores + BLOCK, 2 * LOWEST);
    auto most = load(scores);
    for (int i = WIDEST; i < BLOCK; i += WIDEST) most = larger_of(most, load(scores + i));
    const float larger = std::max(largest, maximum<WIDEST>(most));
    auto added = most - most;
    for (int i = 0; i < BLOCK; i += WIDEST) {
        const auto weights = power_of_two<WIDEST>(load(scores + i) - larger);
        added += weights;
        std::memcpy(scores + i, &weights, sizeof weights);
    }
    const float fade = std::exp2(largest - larger);
    largest = larger;
    total = total * fade + sum<WIDEST>(added);
    return fade;
}

// joint_g = fade_g * joint_g + sum_i weights[g][i] * value_i
inline void gather(
    const float weights[][BLOCK], const float* fades, Rows values, Rows next, int count, float* joint
) {
    for (int first = 0; first < VECTORS; first += TILE) {
        Vector sums[GROUP][TILE];
        for (int g = 0; g < GROUP; ++g)
            for (int v = 0; v < TILE; ++v)
                sums[g][v] = load<LANES>(joint + g * WIDTH + (first + v) * LANES) * fades[g];
        for (int i = 0; i < count; ++i) {
            next.fetch(i, first * LANES, TILE * LANES);
            for (int v = 0; v < TILE; ++v) {
                const Vector part = loaded<LANES>(values[i] + (first + v) * LANES);
                for (int g = 0; g < GROUP; ++g) sums[g][v] += part * weights[g][i];
            }
        }
        for (int g = 0; g < GROUP; ++g)
            for (int v = 0; v < TILE; ++v)
                std::memcpy(joint + g * WIDTH + (first + v) * LANES, &sums[g][v], sizeof(Vector));
    }
}

// An entry of the table that decode.py makes, and describes.
#include "entry.h"

// Rows [first, last) of what a sequence sees, and what comes of them for each of its query heads.
struct Slice {
    int64_t sequence, first, last;
    const Entry* seen;
    std::vector<float> largest = {}, total = {}, joint = {};
};

void attend(const float* query, int64_t kv_heads, float scale, Slice& slice) {
    const int64_t heads = kv_heads * GROUP;
    const Entry& seen = *slice.seen;
    slice.largest.assign(heads, LOWEST);
    slice.total.assign(heads, 0);
    slice.joint.assign(heads * WIDTH, 0);
    float weights[GROUP][BLOCK], fades[GROUP];
    for (int64_t at = slice.first; at < slice.last; at += BLOCK) {
        const int count = std::min<int64_t>(BLOCK, slice.last - at);
        for (int64_t head = 0; head < kv_heads; ++head) {
            const Rows keys{seen.keys + at * seen.key_stride + head * WIDTH, seen.key_stride};
            const Rows values{seen.values + at * seen.value_stride + head * WIDTH, seen.value_stride};
            const int64_t own = head * GROUP;
            score(query + own * WIDTH, keys, values, count, scale, weights);
            for (int g = 0; g < GROUP; ++g)
                fades[g] = weigh(weights[g], count, slice.largest[own + g], slice.total[own + g]);
            gather(weights, fades, values, {keys[BLOCK], keys.stride}, count, &slice.joint[own * WIDTH]);
        }
    }
}

void write_row(const Element* row, int64_t width, Element* to, Element* also_to) {
    std::memcpy(to, row, width * sizeof(Element));
    if (also_to) std::memcpy(also_to, row, width * sizeof(Element));
}

template <class Number> const Number* numbers(const Tensor& tensor) {
    return static_cast<const Number*>(tensor.const_data_ptr());
}

// Each query (B, H, WIDTH) over the rows of its `parts` entries, and a sink, a score without a value for each head.
Tensor attended(const Tensor& query, const Entry* seen, int64_t parts, const float* sinks, double scale) {
    Tensor output = torch::stable::empty_like(query);
    const int64_t count = query.size(0), heads = query.size(1), kv_heads = heads / GROUP, width = kv_heads * WIDTH;
    const Element* queries = numbers<Element>(query);
    std::vector<float> wide(count * heads * WIDTH);
    for (size_t i = 0; i < wide.size(); ++i) wide[i] = widened(queries[i]);
    int64_t rows = 0;
    for (int64_t place = 0; place < count * parts; ++place) rows += seen[place].rows;
    const int64_t even = rows / (SLICES * omp_get_max_threads()) + 1;
    const int64_t share = std::max<int64_t>(even, SMALLEST_SLICE / (width * sizeof(Element)));
    std::vector<Slice> slices;
    for (int64_t place = 0; place < count * parts; ++place)
        for (int64_t from = 0; from < seen[place].rows; from += share)
            slices.push_back({place / parts, from, std::min(from + share, seen[place].rows), seen + place});

#pragma omp parallel for schedule(dynamic) if (slices.size() > 1)
    for (size_t i = 0; i < slices.size(); ++i)
        attend(&wide[slices[i].sequence * heads * WIDTH], kv_heads, float(scale) * LOG2_E, slices[i]);

    // A sequence's slices, and its sink, are joined by the sums of their weights.
    Element* outputs = static_cast<Element*>(output.mutable_data_ptr());
    for (size_t from = 0, to = 0; from < slices.size(); from = to) {
        while (to < slices.size() && slices[to].sequence == slices[from].sequence) ++to;
        Element* own = outputs + slices[from].sequence * heads * WIDTH;
        for (int64_t head = 0; head < heads; ++head) {
            const float before = sinks ? sinks[head] * LOG2_E : LOWEST;
            float largest = before, joint[WIDTH] = {};
            for (size_t i = from; i < to; ++i) largest = std::max(largest, slices[i].largest[head]);
            float total = sinks ? std::exp2(before - largest) : 0;
            for (size_t i = from; i < to; ++i) {
                const float worth = std::exp2(slices[i].largest[head] - largest);
                total += worth * slices[i].total[head];
                for (int c = 0; c < WIDTH; ++c) joint[c] += worth * slices[i].joint[head * WIDTH + c];
            }
            for (int c = 0; c < WIDTH; ++c) write(joint[c] / total, own + head * WIDTH + c);
        }
    }
    return output;
}

// key and value (B, K, WIDTH), or none: the sequences' newest rows; table (B, fields).
Tensor decode(
    const Tensor query, const std::optional<Tensor> key, const std::optional<Tensor> value, const Tensor table,
    double scale
) {
    const Entry* seen = numbers<Entry>(table);
    if (key && value) {
        const int64_t width = key->size(1) * WIDTH;
        for (int64_t s = 0; s < query.size(0); ++s) {
            const Entry& own = seen[s];
            Element *to_key = own.keys + (own.rows - 1) * own.key_stride;
            Element *to_value = own.values + (own.rows - 1) * own.value_stride;
            write_row(numbers<Element>(*key) + s * width, width, to_key, own.kept_key);
            write_row(numbers<Element>(*value) + s * width, width, to_value, own.kept_value);
        }
    }
    return attended(query, seen, 1, nullptr, scale);
}

// One query over the last `window` of its rows, all visible entries or those picked, and a sink (H). Rows (S, WIDTH)
// and entries (E, WIDTH) are key and value at once; visible (1); picks (1, P), places first, then those of none.
Tensor decode_shared(
    const Tensor query, const Tensor rows, const Tensor entries, const Tensor visible,
    const std::optional<Tensor> picks, const Tensor sink, double scale, int64_t window
) {
    const auto place = [](const Tensor& all, int64_t first, int64_t count) {
        Element* from = const_cast<Element*>(numbers<Element>(all)) + first * all.stride(0);
        return Entry{from, from, all.stride(0), all.stride(0), count, nullptr, nullptr};
    };
    const int64_t near = std::min(window, rows.size(0)), far = *numbers<int64_t>(visible);
    Entry seen[2] = {place(rows, rows.size(0) - near, near), place(entries, 0, far)};
    std::vector<Element> gathered;
    if (picks) {
        const int64_t* chosen = numbers<int64_t>(*picks);
        int64_t count = 0;
        while (count < std::min(far, picks->size(1)) && chosen[count] >= 0) ++count;
        gathered.resize(count * WIDTH);
        for (int64_t i = 0; i < count; ++i)
            std::memcpy(&gathered[i * WIDTH], seen[1].keys + chosen[i] * seen[1].key_stride, WIDTH * sizeof(Element));
        seen[1] = {gathered.data(), gathered.data(), WIDTH, WIDTH, count, nullptr, nullptr};
    }
    return attended(query, seen, 2, numbers<float>(sink), scale);
}

STABLE_TORCH_LIBRARY_FRAGMENT(kvell, library) {
    library.def(NAME "(Tensor query, Tensor? key, Tensor? value, Tensor table, float scale) -> Tensor");
    library.def(NAME "_shared(Tensor query, Tensor rows, Tensor entries, Tensor visible, Tensor? picks, Tensor sink, "
                     "float scale, int window) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(kvell, CPU, library) {
    library.impl(NAME, TORCH_BOX(&decode));
    library.impl(NAME "_shared", TORCH_BOX(&decode_shared));
}
