/* Vectors of float32 and int32 for the kernels of this folder: 16 lanes of AVX-512 with VNNI, or 8 of AVX2. */
#pragma once

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)

#define LANES 16
#define SHIFT 128 /* added to rounded inputs of 8-bit products: the instruction takes one unsigned operand */
/* Integers of 32 bits by name: with __m512i, whose lanes have 64, gcc 12 keeps arrays of sums in memory. */
typedef int32_t ints __attribute__((vector_size(64)));
typedef __m512 floats;

INLINE __m512i bits_of(ints x) { return (__m512i)x; }
INLINE ints load_ints(const void *from) { return (ints)_mm512_loadu_si512(from); }
INLINE ints four_of(const int8_t *from) { return (ints)_mm512_set1_epi32(*(const int32_t *)from); }
INLINE ints low_halves(ints line) { return (ints)_mm512_and_si512(bits_of(line), _mm512_set1_epi8(15)); }
INLINE ints high_halves(ints line) { return low_halves((ints)_mm512_srli_epi16(bits_of(line), 4)); }
INLINE ints no_ints(void) { return (ints)_mm512_setzero_si512(); }
INLINE ints int_of(int32_t x) { return (ints)_mm512_set1_epi32(x); }
INLINE ints add_ints(ints a, ints b) { return (ints)_mm512_add_epi32(bits_of(a), bits_of(b)); }
INLINE ints sub_ints(ints a, ints b) { return (ints)_mm512_sub_epi32(bits_of(a), bits_of(b)); }
INLINE ints mul_ints(ints a, ints b) { return (ints)_mm512_mullo_epi32(bits_of(a), bits_of(b)); }
INLINE ints add_products4(ints sum, ints numbers, ints inputs) {
    return (ints)_mm512_dpbusd_epi32(bits_of(sum), bits_of(numbers), bits_of(inputs));
}
INLINE ints add_products8(ints sum, ints weights, ints inputs) { return add_products4(sum, inputs, weights); }
INLINE floats to_floats(ints x) { return _mm512_cvtepi32_ps(bits_of(x)); }
INLINE ints to_ints(floats x) { return (ints)_mm512_cvtps_epi32(x); }
INLINE floats power_of_two(ints n) { return _mm512_castsi512_ps(_mm512_slli_epi32(bits_of(add_ints(n, int_of(127))), 23)); }
INLINE floats load_floats(const float *from) { return _mm512_loadu_ps(from); }
INLINE void store_floats(float *to, floats x) { _mm512_storeu_ps(to, x); }
INLINE void store_ints(int32_t *to, ints x) { _mm512_storeu_si512(to, bits_of(x)); }
INLINE floats all(float x) { return _mm512_set1_ps(x); }
INLINE floats add(floats a, floats b) { return _mm512_add_ps(a, b); }
INLINE floats mul(floats a, floats b) { return _mm512_mul_ps(a, b); }
INLINE floats sub(floats a, floats b) { return _mm512_sub_ps(a, b); }
INLINE floats divide(floats a, floats b) { return _mm512_div_ps(a, b); }
INLINE floats mul_add(floats a, floats b, floats c) { return _mm512_fmadd_ps(a, b, c); }
INLINE floats larger(floats a, floats b) { return _mm512_max_ps(a, b); } /* b where one is NaN */
INLINE floats smaller(floats a, floats b) { return _mm512_min_ps(a, b); }
INLINE floats magnitude(floats x) { return _mm512_abs_ps(x); }
INLINE float largest(floats x) { return _mm512_reduce_max_ps(x); }
INLINE float sum_of(floats x) { return _mm512_reduce_add_ps(x); }
INLINE int is_nan_in(floats x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q) != 0; }
INLINE floats load_bfloats(const uint16_t *from) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)from)), 16));
}
INLINE void store_bytes(int8_t *to, ints x) { _mm_storeu_si128((void *)to, _mm512_cvtepi32_epi8(bits_of(x))); }

#elif defined(__AVX2__) && defined(__FMA__)

#define LANES 8
#define SHIFT 0
typedef __m256i ints;
typedef __m256 floats;

INLINE ints load_ints(const void *from) { return _mm256_loadu_si256(from); }
INLINE ints four_of(const int8_t *from) { return _mm256_set1_epi32(*(const int32_t *)from); }
INLINE ints low_halves(ints line) { return _mm256_and_si256(line, _mm256_set1_epi8(15)); }
INLINE ints high_halves(ints line) { return low_halves(_mm256_srli_epi16(line, 4)); }
INLINE ints no_ints(void) { return _mm256_setzero_si256(); }
INLINE ints add_ints(ints a, ints b) { return _mm256_add_epi32(a, b); }
INLINE ints sub_ints(ints a, ints b) { return _mm256_sub_epi32(a, b); }
INLINE ints mul_ints(ints a, ints b) { return _mm256_mullo_epi32(a, b); }
/* Sums of two products stay within 16 bits: 2 * 15 * 127 here, 2 * 127 * 127 of the magnitudes below. */
INLINE ints add_products4(ints sum, ints numbers, ints inputs) {
    return add_ints(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(numbers, inputs), _mm256_set1_epi16(1)));
}
INLINE ints add_products8(ints sum, ints weights, ints inputs) {
    return add_products4(sum, _mm256_abs_epi8(inputs), _mm256_sign_epi8(weights, inputs));
}
INLINE floats to_floats(ints x) { return _mm256_cvtepi32_ps(x); }
INLINE ints to_ints(floats x) { return _mm256_cvtps_epi32(x); }
INLINE floats power_of_two(ints n) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23)); }
INLINE floats load_floats(const float *from) { return _mm256_loadu_ps(from); }
INLINE void store_floats(float *to, floats x) { _mm256_storeu_ps(to, x); }
INLINE void store_ints(int32_t *to, ints x) { _mm256_storeu_si256((void *)to, x); }
INLINE floats all(float x) { return _mm256_set1_ps(x); }
INLINE ints int_of(int32_t x) { return _mm256_set1_epi32(x); }
INLINE floats add(floats a, floats b) { return _mm256_add_ps(a, b); }
INLINE floats mul(floats a, floats b) { return _mm256_mul_ps(a, b); }
INLINE floats sub(floats a, floats b) { return _mm256_sub_ps(a, b); }
INLINE floats divide(floats a, floats b) { return _mm256_div_ps(a, b); }
INLINE floats mul_add(floats a, floats b, floats c) { return _mm256_fmadd_ps(a, b, c); }
INLINE floats larger(floats a, floats b) { return _mm256_max_ps(a, b); } /* b where one is NaN */
INLINE floats smaller(floats a, floats b) { return _mm256_min_ps(a, b); }
INLINE floats magnitude(floats x) { return _mm256_andnot_ps(all(-0.0f), x); }
INLINE float largest(floats x) {
    float each[LANES], most = 0;
    store_floats(each, x);
    for (int i = 0; i < LANES; i++) most = each[i] > most ? each[i] : most;
    return most;
}
INLINE float sum_of(floats x) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
INLINE int is_nan_in(floats x) { return _mm256_movemask_ps(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)) != 0; }
INLINE floats load_bfloats(const uint16_t *from) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)from)), 16));
}
INLINE void store_bytes(int8_t *to, ints x) {
    int32_t each[LANES];
    store_ints(each, x);
    for (int i = 0; i < LANES; i++) to[i] = (int8_t)each[i];
}

#else
#error "needs AVX2 and FMA, or AVX-512 VNNI"
#endif

/* e to the x, to 1e-7 of it between -87 and 88 and bounded beyond; NaN of NaN. */
INLINE floats exp_of(floats x) {
    x = larger(all(-87.3f), smaller(all(88.3f), x)); /* in this order NaN stays */
    ints n = to_ints(mul(x, all(1.44269504f)));
    floats r = mul_add(to_floats(n), all(-0.693359375f), x);
    r = mul_add(to_floats(n), all(2.12194440e-4f), r);
    floats y = all(1.9875691500e-4f);
    y = mul_add(y, r, all(1.3981999507e-3f));
    y = mul_add(y, r, all(8.3334519073e-3f));
    y = mul_add(y, r, all(4.1665795894e-2f));
    y = mul_add(y, r, all(1.6666665459e-1f));
    y = mul_add(y, r, all(5.0000001201e-1f));
    y = add(mul_add(y, mul(r, r), r), all(1));
    return mul(y, power_of_two(n));
}

/* tanh(y) = 1 - 2 / (1 + e^2y), so the tanh GELU x / 2 * (1 + tanh(y)) = x - x / (1 + e^2y). */
INLINE floats tanh_gelu(floats x) {
    floats e = exp_of(mul(all(2 * 0.7978845608f), mul_add(all(0.044715f), mul(mul(x, x), x), x)));
    return sub(x, divide(x, add(all(1), e)));
}

/* Rounded to the nearest bfloat16, ties to even. */
INLINE uint16_t to_bfloat(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

/* The largest magnitude of a row, at least `least`; `nan` tells whether one of its numbers is NaN. */
INLINE float peak_of(const float *x, int64_t width, float least, int *nan) {
    floats most = all(least);
    *nan = 0;
    for (int64_t i = 0; i < width; i += LANES) {
        floats v = load_floats(x + i);
        most = larger(magnitude(v), most);
        *nan |= is_nan_in(v);
    }
    return largest(most);
}

/* LayerNorm of a row, which may be where the result goes; without a bias where that is NULL. */
INLINE void layer_norm(const float *x, const float *weight, const float *bias, float eps, int64_t width, float *to) {
    floats total = all(0), squares = all(0);
    for (int64_t i = 0; i < width; i += LANES) total = add(total, load_floats(x + i));
    const floats mean = all(sum_of(total) / width);
    for (int64_t i = 0; i < width; i += LANES) {
        floats v = sub(load_floats(x + i), mean);
        squares = mul_add(v, v, squares);
    }
    const floats factor = all(1 / sqrtf(sum_of(squares) / width + eps));
    for (int64_t i = 0; i < width; i += LANES) {
        floats v = mul(sub(load_floats(x + i), mean), factor);
        store_floats(to + i, mul_add(v, load_floats(weight + i), bias ? load_floats(bias + i) : all(0)));
    }
}
