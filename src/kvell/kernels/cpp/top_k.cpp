// The largest of every row's scores, of equal ones the first; see kernels/top_k.py.
//
// What exceeds a threshold is noted, in the row's order; when there is no more room, all but the k largest are
// forgotten and the smallest of them is the threshold from then on. A later score that equals it is not among the k
// largest: those noted stand before it. A long row is read twice: divided into more than k groups, it has no fewer
// than k scores as large as the k-th of the groups' maxima, and seldom many more.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "common.h"

using torch::stable::Tensor;
using Vector = Floats<WIDEST>::type;

constexpr float NOTHING = -std::numeric_limits<float>::infinity();
constexpr int64_t AT_ONCE = 32;     // scores that are compared before any of them is looked at
constexpr int64_t ALONE = 1 << 15;  // so many scores are not worth a second thread
constexpr int64_t SMALLEST_GROUP = 4;

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
        scores.push_back(std::isnan(score) ? NOTHING : score);
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

// scores (R, N), of which a row's first seen[r] count; places (R, k), ascending, then -1. Everything contiguous.
Tensor top_k(const Tensor scores, const Tensor seen, int64_t k) {
    const int64_t rows = scores.size(0), length = scores.size(1);
    Tensor places = torch::stable::new_empty(seen, {rows, k});
    const float* from = static_cast<const float*>(scores.const_data_ptr());
    const int64_t* counts = static_cast<const int64_t*>(seen.const_data_ptr());
    int64_t* to = static_cast<int64_t*>(places.mutable_data_ptr());
#pragma omp parallel if (rows > 1 && rows * length > ALONE)
    {
        Noted noted(k);
#pragma omp for schedule(dynamic, 8)
        for (int64_t row = 0; row < rows; ++row) {
            if (counts[row] > 0) choose(from + row * length, counts[row], noted, to + row * k);
            else std::fill(to + row * k, to + (row + 1) * k, -1);
        }
    }
    return places;
}

STABLE_TORCH_LIBRARY_FRAGMENT(kvell, library) {
    library.def(NAME "(Tensor scores, Tensor seen, int k) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(kvell, CPU, library) { library.impl(NAME, TORCH_BOX(&top_k)); }
