/* Image encoder with 8-bit weights, for processors with AVX-512: what happens to rows between two products, in one pass
 * over each row, and attention (AVX-512 BF16).
 *
 * Products (host_linear.c) take rows rounded to 8 bits, each by its largest magnitude.
 *
 * Notation: N rows of an image, M rows, W width of a row, H heads, C width of a head.
 */
#include "host_threads.h"
#include "host_vectors.h"

#if LANES == 16
#include <stdatomic.h>

#define ROWS_AT_A_TIME 8
#define LEAST_PEAK 1e-36f /* 127 / peak is finite */
#define LOG2_E 1.44269504f

/* 2 to the power of x: a polynomial between -1/2 and 1/2 (relative error 2e-7), the rest goes into the exponent. */
INLINE floats power_of_2(floats x) {
    floats whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    floats f = _mm512_sub_ps(x, whole), y = all(1.54035304e-4f);
    y = mul_add(y, f, all(1.33335581e-3f));
    y = mul_add(y, f, all(9.61812911e-3f));
    y = mul_add(y, f, all(5.55041087e-2f));
    y = mul_add(y, f, all(2.40226507e-1f));
    y = mul_add(y, f, all(6.93147181e-1f));
    return _mm512_scalef_ps(mul_add(y, f, all(1)), whole);
}

/* x times the normal distribution's share below x; absolute error of the share 1e-7 (Abramowitz and Stegun 7.1.26). */
INLINE floats gelu(floats x) {
    floats z = mul(magnitude(x), all(0.707106781f));
    floats t = divide(all(1), mul_add(z, all(0.3275911f), all(1)));
    floats y = mul_add(t, all(1.061405429f), all(-1.453152027f));
    y = mul_add(y, t, all(1.421413741f));
    y = mul_add(y, t, all(-0.284496736f));
    y = mul_add(y, t, all(0.254829592f));
    floats tail = mul(mul(mul(y, t), all(0.5f)), power_of_2(larger(mul(mul(z, z), all(-LOG2_E)), all(-126))));
    return mul(x, _mm512_mask_sub_ps(tail, _mm512_cmp_ps_mask(x, all(0), _CMP_GE_OQ), all(1), tail));
}

/* Round a row to 1..255. Returns its scale, NaN where one of its numbers is NaN. */
INLINE float round_row(const float *row, int64_t width, uint8_t *to) {
    int nan;
    const float peak = peak_of(row, width, LEAST_PEAK, &nan);
    const floats factor = all(127 / peak);
    for (int64_t i = 0; i < width; i += LANES)
        store_bytes((int8_t *)to + i, add_ints(to_ints(mul(load_floats(row + i), factor)), int_of(SHIFT)));
    return nan ? NAN : peak / 127;
}

typedef struct {
    const float *x, *norm_weight, *norm_bias;
    float epsilon, *scale;
    uint8_t *rounded;
    int64_t rows, width;
    int with_gelu;
    atomic_int failed;
} Rows;

static void round_rows(void *argument, int64_t item) {
    Rows *r = argument;
    float *row = malloc(r->width * sizeof(float));
    if (!row) {
        atomic_store(&r->failed, 1);
        return;
    }
    for (int64_t m = item * ROWS_AT_A_TIME; m < (item + 1) * ROWS_AT_A_TIME && m < r->rows; m++) {
        const float *x = r->x + m * r->width;
        if (r->with_gelu)
            for (int64_t i = 0; i < r->width; i += LANES) store_floats(row + i, gelu(load_floats(x + i)));
        else if (r->norm_weight)
            layer_norm(x, r->norm_weight, r->norm_bias, r->epsilon, r->width, row);
        r->scale[m] = round_row(r->with_gelu || r->norm_weight ? row : x, r->width, r->rounded + m * r->width);
    }
    free(row);
}

/* Round x [M, W], or its GELU, or, where `norm_weight` is given, its LayerNorm, to `rounded` and `scale` [M]. W is a
 * multiple of 16. Returns 0, or 1 where memory is missing. */
int encoder_rows(
    const float *x, const float *norm_weight, const float *norm_bias, float epsilon, int with_gelu, uint8_t *rounded,
    float *scale, int64_t rows, int64_t width, int threads
) {
    Rows r = {
        .x = x, .norm_weight = norm_weight, .norm_bias = norm_bias, .epsilon = epsilon, .scale = scale,
        .rounded = rounded, .rows = rows, .width = width, .with_gelu = with_gelu
    };
    share_items(round_rows, &r, (rows + ROWS_AT_A_TIME - 1) / ROWS_AT_A_TIME, threads);
    return r.failed;
}

#ifdef __AVX512BF16__

/* Sums of a tile stay in registers: 8 queries by 48 keys, then 8 queries by 48 columns of the values, twice. What a tile
 * reads lies in one piece: a stream of memory that ends after some lines costs a wait. */
#define QUERIES 8
#define PARTS 3
#define TILE (PARTS * LANES)
#define MOST_WIDTH (2 * TILE)
#define FAR -1e30f /* score of a key that does not exist: its weight is 0 */

/* Q, K or V of one head of one image; rows start `stride` apart. */
typedef struct {
    const float *rows;
    int64_t stride, count, width;
} HeadRows;

/* 16 columns of a row as bfloat16; 0 past its end and for rows that do not exist. */
INLINE __m256i load_half(const HeadRows *of, int64_t row, int64_t column, float factor) {
    if (row >= of->count) return _mm256_setzero_si256();
    const int64_t left = of->width - column;
    const __mmask16 mask = left >= LANES ? 0xffff : (__mmask16)((1 << left) - 1);
    floats v = _mm512_maskz_loadu_ps(mask, of->rows + row * of->stride + column);
    return (__m256i)_mm512_cvtneps_pbh(mul(v, all(factor)));
}

/* Keys in the order in which they are read: tiles of 48 keys, of which pairs of columns lie side by side. */
INLINE void pack_keys(const HeadRows *keys, int64_t padded, uint32_t *to) {
    const int64_t pairs = keys->width / 2;
    for (int64_t n = 0; n < padded; n++)
        for (int64_t c = 0; c < keys->width; c += LANES) {
            uint32_t each[LANES / 2];
            _mm256_storeu_si256((void *)each, load_half(keys, n, c, 1));
            for (int64_t j = 0; j < LANES / 2 && c / 2 + j < pairs; j++)
                to[(n / TILE * pairs + c / 2 + j) * TILE + n % TILE] = each[j];
        }
}

/* Values: tiles of 48 columns, of which pairs of keys lie side by side. */
INLINE void pack_values(const HeadRows *values, int64_t padded, uint32_t *to) {
    for (int64_t start = 0; start < values->width; start += TILE)
        for (int64_t n = 0; n < padded; n += 2)
            for (int64_t c = start; c < start + TILE; c += LANES, to += LANES) {
                __m512i both = _mm512_setzero_si512();
                if (c < values->width)
                    both = _mm512_or_si512(
                        _mm512_cvtepu16_epi32(load_half(values, n, c, 1)),
                        _mm512_slli_epi32(_mm512_cvtepu16_epi32(load_half(values, n + 1, c, 1)), 16)
                    );
                _mm512_store_si512(to, both);
            }
}

INLINE floats add_pairs(floats sum, uint32_t pair, ints others) {
    return _mm512_dpbf16_ps(sum, (__m512bh)int_of((int32_t)pair), (__m512bh)others);
}

/* scores [8, padded] = queries . keys, in powers of two. */
INLINE void score(const HeadRows *of, int64_t first, const uint32_t *keys, int64_t padded, float *scores) {
    const int64_t pairs = of->width / 2;
    const float factor = LOG2_E / sqrtf(of->width);
    uint32_t queries[QUERIES][MOST_WIDTH / 2];
    for (int q = 0; q < QUERIES; q++)
        for (int64_t c = 0; c < of->width; c += LANES)
            _mm256_storeu_si256((void *)&queries[q][c / 2], load_half(of, first + q, c, factor));
    for (int64_t n = 0; n < padded; n += TILE) {
        floats sum[QUERIES][PARTS];
        for (int q = 0; q < QUERIES; q++)
            for (int k = 0; k < PARTS; k++) sum[q][k] = all(0);
        for (int64_t p = 0; p < pairs; p++, keys += TILE)
            for (int q = 0; q < QUERIES; q++)
                for (int k = 0; k < PARTS; k++)
                    sum[q][k] = add_pairs(sum[q][k], queries[q][p], load_ints(keys + k * LANES));
        for (int q = 0; q < QUERIES; q++)
            for (int k = 0; k < PARTS; k++) store_floats(scores + q * padded + n + k * LANES, sum[q][k]);
    }
}

/* Weights (bfloat16, pairs of keys) of a row of scores, not yet divided by their sum. Returns 1 / sum. */
INLINE float softmax(float *scores, int64_t count, int64_t padded, uint32_t *weights) {
    for (int64_t n = count; n < padded; n++) scores[n] = FAR;
    floats most = all(FAR), total = all(0);
    for (int64_t n = 0; n < padded; n += LANES) most = larger(load_floats(scores + n), most);
    most = all(largest(most));
    for (int64_t n = 0; n < padded; n += LANES) {
        floats weight = power_of_2(_mm512_sub_ps(load_floats(scores + n), most));
        total = add(total, weight);
        _mm256_storeu_si256((void *)(weights + n / 2), (__m256i)_mm512_cvtneps_pbh(weight));
    }
    return 1 / _mm512_reduce_add_ps(total);
}

/* 8 rows of out = weights . values; `rows` of them exist. */
INLINE void weigh(
    const uint32_t *weights, const float *factors, const uint32_t *values, int64_t count, int64_t padded, float *out,
    int64_t rows, int64_t width, int64_t stride
) {
    for (int64_t c = 0; c < width; c += TILE, values += padded / 2 * TILE) {
        floats sum[QUERIES][PARTS];
        for (int q = 0; q < QUERIES; q++)
            for (int p = 0; p < PARTS; p++) sum[q][p] = all(0);
        for (int64_t n = 0; n < (count + 1) / 2; n++)
            for (int q = 0; q < QUERIES; q++)
                for (int p = 0; p < PARTS; p++)
                    sum[q][p] = add_pairs(sum[q][p], weights[q * padded / 2 + n], load_ints(values + n * TILE + p * LANES));
        for (int q = 0; q < QUERIES; q++)
            for (int p = 0; p < PARTS; p++) {
                const int64_t left = width - c - p * LANES;
                const __mmask16 mask = q >= rows || left <= 0 ? 0 : left >= LANES ? 0xffff : (__mmask16)((1 << left) - 1);
                _mm512_mask_storeu_ps(out + q * stride + c + p * LANES, mask, mul(sum[q][p], all(factors[q])));
            }
    }
}

/* Attention of one image. Q, K and V are columns of `qkv`. */
typedef struct {
    const float *qkv;
    float *out;
    uint32_t *keys, *values; /* packed, `key_size` and `value_size` numbers for each head */
    int64_t count, heads, width, padded, key_size, value_size, blocks;
    atomic_int failed;
} Attention;

/* Q, K or V (`which` 0, 1, 2) of a head. */
INLINE HeadRows head_of(const Attention *a, int which, int64_t h) {
    const int64_t all_heads = a->heads * a->width;
    return (HeadRows){a->qkv + which * all_heads + h * a->width, 3 * all_heads, a->count, a->width};
}

static void pack_head(void *argument, int64_t h) {
    const Attention *a = argument;
    const HeadRows keys = head_of(a, 1, h), values = head_of(a, 2, h);
    pack_keys(&keys, a->padded, a->keys + h * a->key_size);
    pack_values(&values, a->padded, a->values + h * a->value_size);
}

static void attend_block(void *argument, int64_t item) {
    Attention *a = argument;
    const int64_t h = item / a->blocks, first = item % a->blocks * QUERIES, all_heads = a->heads * a->width;
    const HeadRows queries = head_of(a, 0, h);
    float factors[QUERIES], *scores = aligned_alloc(64, QUERIES * a->padded * (sizeof(float) + sizeof(uint16_t)));
    if (!scores) {
        atomic_store(&a->failed, 1);
        return;
    }
    uint32_t *weights = (uint32_t *)(scores + QUERIES * a->padded);
    score(&queries, first, a->keys + h * a->key_size, a->padded, scores);
    for (int q = 0; q < QUERIES; q++)
        factors[q] = softmax(scores + q * a->padded, a->count, a->padded, weights + q * a->padded / 2);
    weigh(
        weights, factors, a->values + h * a->value_size, a->count, a->padded, a->out + first * all_heads + h * a->width,
        a->count - first, a->width, all_heads
    );
    free(scores);
}

/* out [N, H C] = attention of an image's rows; qkv: [N, 3 H C]. C is even and at most 96. Returns 0, or 1 where memory is
 * missing. */
int encoder_attention(const float *qkv, float *out, int64_t count, int64_t heads, int64_t width, int threads) {
    const int64_t padded = (count + TILE - 1) / TILE * TILE;
    Attention a = {
        .qkv = qkv, .out = out, .count = count, .heads = heads, .width = width, .padded = padded, .key_size = padded * MOST_WIDTH / 2,
        .value_size = padded * MOST_WIDTH / 2, .blocks = (count + QUERIES - 1) / QUERIES
    };
    a.keys = aligned_alloc(64, heads * (a.key_size + a.value_size) * sizeof(uint32_t)); /* whole lines of 64 bytes */
    if (!a.keys) return 1;
    a.values = a.keys + heads * a.key_size;
    share_items(pack_head, &a, heads, threads);
    share_items(attend_block, &a, heads * a.blocks, threads);
    free(a.keys);
    return a.failed;
}
#endif
#endif
