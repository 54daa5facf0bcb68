// What the kernels share: vectors of floats as the compiler knows them, and the name that Python gives an operator.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>

// How many numbers the processor works on at once, and about how many such vectors it has room for.
#if defined(__AVX512F__)
constexpr int WIDEST = 16, REGISTERS = 16;
#elif defined(__AVX2__)
constexpr int WIDEST = 8, REGISTERS = 8;
#else
constexpr int WIDEST = 4, REGISTERS = 16;
#endif

template <int lanes> struct Floats { typedef float type __attribute__((vector_size(4 * lanes))); };
template <> struct Floats<1> { typedef float type; };  // clang 14 cannot choose between vectors of one
template <int lanes> struct Words { typedef int32_t type __attribute__((vector_size(4 * lanes))); };
template <int lanes> struct Halves { typedef uint16_t type __attribute__((vector_size(2 * lanes))); };

// Of two vectors, or numbers, the larger one's; a's where b's is not a number.
template <class Number> inline Number larger_of(Number a, Number b) { return a < b ? b : a; }

// a, and where it is not a number infinity: torch takes that for larger than any other.
template <class Number> inline Number ordered(Number a) {
    return a == a ? a : Number{} + std::numeric_limits<float>::infinity();
}

// All of a vector's numbers as one, by the sum or the maximum of its halves.
template <int lanes, class Join> inline float joined(typename Floats<lanes>::type vector, Join join) {
    if constexpr (lanes == 1) {
        return vector;
    } else {
        typename Floats<lanes / 2>::type halves[2];
        std::memcpy(halves, &vector, sizeof vector);
        return joined<lanes / 2>(join(halves[0], halves[1]), join);
    }
}
template <int lanes> inline float sum(typename Floats<lanes>::type vector) {
    return joined<lanes>(vector, [](auto a, auto b) { return a + b; });
}
template <int lanes> inline float maximum(typename Floats<lanes>::type vector) {
    return joined<lanes>(vector, [](auto a, auto b) { return larger_of(a, b); });
}

// Of the polynomials of this degree that are 1 at 0, the one nearest to 2^x for |x| <= 1/2: within 9e-8.
template <class Vector> inline Vector power_near_one(Vector x) {
    Vector power = Vector{} + 1.3264726e-3f;
    for (const float term : {9.6715138e-3f, 5.5507338e-2f, 2.4022242e-1f, 6.9314698e-1f, 1.f}) power = power * x + term;
    return power;
}

// 2^x for x <= 0, to within 3e-7 of it, and 0 below 2^-126 or so.
template <int lanes> inline typename Floats<lanes>::type power_of_two(typename Floats<lanes>::type x) {
    using Vector = typename Floats<lanes>::type;
    using Numbers = typename Words<lanes>::type;
#if defined(__AVX512F__)
    if constexpr (lanes == 16) {
        Vector whole, power;
        asm("vrndscaleps $0, %1, %0" : "=v"(whole) : "v"(x));                        // x to the nearest whole number
        asm("vscalefps %2, %1, %0" : "=v"(power) : "v"(power_near_one(x - whole)), "v"(whole));  // times 2^whole
        return x < Vector{} - 126.f ? Vector{} : power;
    }
#endif
    const Vector least = Vector{} - 127.f, shift = Vector{} + 12582912.f;  // 1.5 * 2^23: added to x, it rounds it
    x = x < least ? least : x;
    const Vector number = x - x;  // zero, unless x is none
    const Vector whole = x + shift;
    const Vector power = power_near_one(x - (whole - shift));
    return (Vector)((Numbers)power + ((Numbers)whole << 23)) + number;
}

inline float widened(float number) { return number; }
inline float widened(uint16_t bits) {
    const uint32_t word = uint32_t(bits) << 16;
    float number;
    std::memcpy(&number, &word, sizeof number);
    return number;
}

template <int count> inline void widen(const float* from, float* to) { std::memcpy(to, from, count * sizeof(float)); }
template <int count> inline void widen(const uint16_t* from, float* to) {
#pragma omp simd
    for (int i = 0; i < count; ++i) to[i] = widened(from[i]);
}

inline void write(float number, float* to) { *to = number; }
inline void write(float number, uint16_t* to) {
    uint32_t word;
    std::memcpy(&word, &number, sizeof word);
    *to = std::isnan(number) ? 0x7fc0 : (word + 0x7fff + ((word >> 16) & 1)) >> 16;  // ties to even
}

template <int lanes = WIDEST> inline typename Floats<lanes>::type load(const float* from) {
    typename Floats<lanes>::type vector;
    std::memcpy(&vector, from, sizeof vector);
    return vector;
}

// The same, widened from whatever they are kept as.
template <int lanes> inline typename Floats<lanes>::type loaded(const float* from) { return load<lanes>(from); }
template <int lanes> inline typename Floats<lanes>::type loaded(const uint16_t* from) {
    if constexpr (lanes == 1) {
        return widened(*from);
    } else {
        typename Halves<lanes>::type halves;
        std::memcpy(&halves, from, sizeof halves);
        const auto words = __builtin_convertvector(halves, typename Words<lanes>::type);
        return (typename Floats<lanes>::type)(words << 16);
    }
}

constexpr int largest_divisor(int number, int most) {
    int divisor = std::max(std::min(number, most), 1);
    while (number % divisor) --divisor;
    return divisor;
}

constexpr float LOG2_E = 1.44269504088896341f;
constexpr float LOWEST = -1e30;  // below every score, and finite: a difference of two is a number

#define TEXT(name) #name
#define TEXT_OF(name) TEXT(name)
#define NAME TEXT_OF(OPERATOR)
