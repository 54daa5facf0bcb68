// Sinkhorn's iterations on every token's matrix of STREAMS x STREAMS, as kernels/hyper_connections.py has them: softmax
// of each row, then columns and rows divided by their sums in turn. All arithmetic is fp32.
//
// A vector holds one place of as many tokens' matrices, so sums of rows and of columns are alike, and as far as
// registers suffice (4 streams with AVX-512) a matrix stays in them from the first iteration to the last. In torch each
// half of an iteration is an operator or two of its own, on sixteen numbers where a single token is decoded.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "common.h"

using torch::stable::Tensor;

constexpr int PLACES = STREAMS * STREAMS;
constexpr int FEWEST = 4;       // tokens of a vector
constexpr int64_t ALONE = 256;  // so many tokens are not worth a second thread

// mix[i][j] of up to `lanes` tokens; in lanes that stand for none there is zero.
template <int lanes> void sinkhorn_block(const float* logits, int64_t tokens, int64_t iterations, float eps, float* to) {
    using Vector = typename Floats<lanes>::type;
    alignas(64) float laid_out[PLACES][lanes] = {};
    Vector mix[STREAMS][STREAMS];
    for (int64_t t = 0; t < tokens; ++t)
        for (int place = 0; place < PLACES; ++place) laid_out[place][t] = logits[t * PLACES + place];
    std::memcpy(mix, laid_out, sizeof mix);

    for (auto& row : mix) {
        Vector largest = row[0], total = {};
        for (const Vector number : row) largest = larger_of(largest, number);
        for (Vector& number : row) {
            number = power_of_two<lanes>((number - largest) * LOG2_E);
            total += number;
        }
        const Vector share = 1.f / total;
        for (Vector& number : row) number = number * share + eps;
    }
    const auto divide_columns = [&] {
        for (int j = 0; j < STREAMS; ++j) {
            Vector total = Vector{} + eps;
            for (int i = 0; i < STREAMS; ++i) total += mix[i][j];
            const Vector share = 1.f / total;
            for (int i = 0; i < STREAMS; ++i) mix[i][j] *= share;
        }
    };
    const auto divide_rows = [&] {
        for (auto& row : mix) {
            Vector total = Vector{} + eps;
            for (const Vector number : row) total += number;
            const Vector share = 1.f / total;
            for (Vector& number : row) number *= share;
        }
    };
    divide_columns();
    for (int64_t done = 1; done < iterations; ++done) {
        divide_rows();
        divide_columns();
    }

    std::memcpy(laid_out, mix, sizeof mix);
    for (int64_t t = 0; t < tokens; ++t)
        for (int place = 0; place < PLACES; ++place) to[t * PLACES + place] = laid_out[place][t];
}

// logits (T, STREAMS, STREAMS) in fp32, contiguous.
Tensor sinkhorn(const Tensor logits, int64_t iterations, double eps) {
    Tensor mix = torch::stable::empty_like(logits);
    const int64_t tokens = logits.size(0);
    const float* from = static_cast<const float*>(logits.const_data_ptr());
    float* to = static_cast<float*>(mix.mutable_data_ptr());
    if (tokens <= FEWEST) {
        sinkhorn_block<FEWEST>(from, tokens, iterations, float(eps), to);
        return mix;
    }
#pragma omp parallel for if (tokens > ALONE)
    for (int64_t first = 0; first < tokens; first += WIDEST) {
        const int64_t place = first * PLACES, count = std::min<int64_t>(WIDEST, tokens - first);
        sinkhorn_block<WIDEST>(from + place, count, iterations, float(eps), to + place);
    }
    return mix;
}

STABLE_TORCH_LIBRARY_FRAGMENT(kvell, library) {
    library.def(NAME "(Tensor logits, int iterations, float eps) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(kvell, CPU, library) { library.impl(NAME, TORCH_BOX(&sinkhorn)); }
