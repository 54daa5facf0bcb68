// What the kernels share: vectors of floats as the compiler knows them, and the name that Python gives an operator.

#pragma once

#include <algorithm>
#include <cstring>

// How many numbers the processor works on at once, and about how many such vectors it has room for.
#if defined(__AVX512F__)
constexpr int WIDEST = 16, REGISTERS = 16;
#elif defined(__AVX2__)
constexpr int WIDEST = 8, REGISTERS = 8;
#else
constexpr int WIDEST = 4, REGISTERS = 16;
#endif

template <int lanes> struct Floats { typedef float type __attribute__((vector_size(4 * lanes))); };

template <int lanes> inline float sum(typename Floats<lanes>::type vector) {
    if constexpr (lanes == 2) {
        return vector[0] + vector[1];
    } else {
        typename Floats<lanes / 2>::type halves[2];
        std::memcpy(halves, &vector, sizeof vector);
        return sum<lanes / 2>(halves[0] + halves[1]);
    }
}

constexpr int largest_divisor(int number, int most) {
    int divisor = std::max(std::min(number, most), 1);
    while (number % divisor) --divisor;
    return divisor;
}

#define TEXT(name) #name
#define TEXT_OF(name) TEXT(name)
#define NAME TEXT_OF(OPERATOR)
