/* Products of float32 rows with an 8-bit or a 4-bit matrix, for x86 processors with AVX2 or AVX-512 VNNI.
 *
 * The time of one row is the time to read the weights, so they lie in the order in which they are read, and what is
 * multiplied is integers: inputs are rounded to 8 bits on the way in.
 *
 * Weights are cut into blocks of 16 outputs. A line is 64 bytes: 16 outputs of 4 inputs each (8 bits), or of 8 inputs
 * (4 bits: the first four in the low halves of the bytes, the next four in the high halves). Of 4-bit weights, the lines
 * of a group are followed by the group's 16 scales and 16 offsets (bfloat16); a weight is (number - 8) * scale + offset.
 * Rounded inputs of 8-bit products are rows; of 4-bit ones, the up to 8 rows of a tile alternate: four numbers of the
 * first row, four of the second, ...
 *
 * Notation: M rows of the input, I input width, O output width, G inputs that share a 4-bit scale.
 */
#include "host_linear.h"

#include "host_threads.h"
#include "host_vectors.h"

#define BLOCK 16
#define LINE 64
#define PAGE 4096
/* Blocks that are read together: four streams of memory are read faster than one. */
#define BLOCKS (LANES == 16 ? 4 : 1)
#define OUTPUTS (BLOCKS * BLOCK) /* of an item */
/* Rows of the input that share one reading of the weights. Their sums stay in the 32 registers of AVX-512: 24 of 6 rows
 * with 8 bits; with 4, which also have sums in float32, 8 of 8 rows, or 16 of up to 4 rows in four blocks. */
#define TILE8 6
#define TILE4 8
#define FEW 4 /* rows: reading the weights takes longer than multiplying */
#define ROWS8 (43 * TILE8) /* of an item: small enough that threads end together */

#define PARTS (BLOCK / LANES) /* vectors that hold the 16 outputs of a block */
#define SUMS 24               /* at most: rows * blocks * PARTS of a tile */
#define LEAST_NORMAL 1.17549435e-38f

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Bytes of a block of 16 outputs with 4 bits. */
INLINE int64_t bytes4(int64_t width, int64_t group) { return width * (BLOCK / 2) + width / group * LINE; }

/* Round `width` inputs (a multiple of 16) to -127..127. Returns the scale, NaN where an input is NaN. `to` gets the
 * numbers plus `shift`, four for each row of a tile in turn; `total` gets their sum without it. */
INLINE float round_inputs(const float *x, int64_t width, ints shift, int64_t tile, int8_t *to, float *total) {
    int nan;
    const float peak = peak_of(x, width, LEAST_NORMAL, &nan);
    ints sum = no_ints();
    for (int64_t i = 0; i < width; i += LANES) {
        ints number = to_ints(mul(divide(load_floats(x + i), all(peak)), all(127)));
        sum = add_ints(sum, number);
        int8_t bytes[LANES];
        store_bytes(bytes, add_ints(number, shift));
        for (int j = 0; j < LANES; j += 4) memcpy(to + (i + j) * tile, bytes + j, 4);
    }
    float each[LANES];
    store_floats(each, to_floats(sum));
    *total = 0;
    for (int i = 0; i < LANES; i++) *total += each[i];
    return nan ? NAN : peak / 127;
}

/* Processors read ahead within a page of 4 KB. Every sixteenth line asks for the one a page later, so that what follows has
 * begun when the page ends. */
INLINE void read_ahead(const void *line) {
    if (!((uintptr_t)line & (16 * LINE - 1))) __builtin_prefetch((const char *)line + PAGE, 0, 2);
}

/* `blocks` times 16 outputs of `tile` rows with 8 bits; blocks are `apart` bytes apart. sum: [blocks * PARTS, tile]. */
INLINE void block8(
    const int8_t *weights, int64_t apart, const int8_t *inputs, int64_t width, int tile, int blocks, ints sum[SUMS]
) {
    /* Few rows have few sums, each of which has to wait for the one before: so they get several. */
    const int vectors = blocks * PARTS, ways = blocks > 1 || tile > 3 ? 1 : tile == 1 ? 4 : 2;
    ints part[4][SUMS];
    for (int w = 0; w < ways; w++)
        for (int s = 0; s < vectors * tile; s++) part[w][s] = no_ints();
    for (int64_t i = 0; i < width; i += 4 * ways)
        for (int w = 0; w < ways; w++) {
            ints lines[BLOCKS * PARTS];
            for (int v = 0; v < vectors; v++) {
                const int8_t *line = weights + v / PARTS * apart + (i / 4 + w) * LINE;
                if (tile <= FEW && v % PARTS == 0) read_ahead(line);
                lines[v] = load_ints(line + v % PARTS * (LINE / PARTS));
            }
            for (int t = 0; t < tile; t++) {
                const ints four = four_of(inputs + t * width + i + 4 * w);
                for (int v = 0; v < vectors; v++)
                    part[w][v * tile + t] = add_products8(part[w][v * tile + t], lines[v], four);
            }
        }
    for (int s = 0; s < vectors * tile; s++) {
        sum[s] = part[0][s];
        for (int w = 1; w < ways; w++) sum[s] = add_ints(sum[s], part[w][s]);
    }
}

/* `blocks` times 16 outputs of `tile` rows with 4 bits, summed in float32; blocks are `apart` bytes apart. inputs: a tile;
 * scales, totals: [tile, I / G], of the inputs and of their sums; sum: [blocks * PARTS, tile]. */
INLINE void block4(
    const uint8_t *weights, int64_t apart, const int8_t *inputs, const float *scales, const float *totals, int64_t width,
    int64_t group, int tile, int blocks, floats sum[SUMS]
) {
    const int64_t groups = width / group;
    const int vectors = blocks * PARTS, ways = vectors * tile <= 8 ? 2 : 1;
    for (int s = 0; s < vectors * tile; s++) sum[s] = all(0);
    for (int64_t g = 0; g < groups; g++) {
        ints part[2][SUMS];
        for (int w = 0; w < ways; w++)
            for (int s = 0; s < vectors * tile; s++) part[w][s] = no_ints();
        for (int64_t i = 0; i < group; i += 8, weights += LINE)
            for (int v = 0; v < vectors; v++) {
                const uint8_t *from = weights + v / PARTS * apart;
                if (tile <= FEW && v % PARTS == 0) read_ahead(from);
                const ints line = load_ints(from + v % PARTS * (LINE / PARTS));
                for (int t = 0; t < tile; t++) {
                    const int8_t *x = inputs + (g * group + i) * tile + 4 * t;
                    ints *low = &part[0][v * tile + t], *high = &part[ways - 1][v * tile + t];
                    *low = add_products4(*low, low_halves(line), four_of(x));
                    *high = add_products4(*high, high_halves(line), four_of(x + 4 * tile));
                }
            }
        for (int v = 0; v < vectors; v++) {
            const uint16_t *of_group = (const uint16_t *)(weights + v / PARTS * apart) + v % PARTS * LANES;
            floats scale = load_bfloats(of_group);
            floats offset = mul_add(all(-8), scale, load_bfloats(of_group + BLOCK));
            for (int t = 0; t < tile; t++) {
                const int s = v * tile + t;
                floats product = to_floats(ways == 1 ? part[0][s] : add_ints(part[0][s], part[1][s]));
                sum[s] = mul_add(product, mul(scale, all(scales[t * groups + g])), sum[s]);
                sum[s] = mul_add(offset, all(totals[t * groups + g]), sum[s]);
            }
        }
        weights += LINE; /* 16 scales and 16 offsets */
    }
}

/* The compiler makes a version of `code` for each number of rows, so that sums stay in registers. */
#define FOR_EACH_TILE(tile, code) \
    switch (tile) { \
    case 1: { enum { T = 1 }; code } break; \
    case 2: { enum { T = 2 }; code } break; \
    case 3: { enum { T = 3 }; code } break; \
    case 4: { enum { T = 4 }; code } break; \
    case 5: { enum { T = 5 }; code } break; \
    case 6: { enum { T = 6 }; code } break; \
    case 7: { enum { T = 7 }; code } break; \
    default: { enum { T = 8 }; code } break; \
    }

static void round_row8(const Product *p, int64_t m) {
    const int64_t width = p->matrix->inputs;
    int8_t *to = p->rounded.numbers + m * width;
    p->rounded.scales[m] = round_inputs(p->x + m * width, width, int_of(SHIFT), 1, to, p->rounded.sums + m);
}

static void round_row4(const Product *p, int64_t m) {
    const int64_t inputs = p->matrix->inputs, group = p->matrix->group, groups = inputs / group;
    const int64_t first = m - m % TILE4, tile = least(p->rows - first, TILE4);
    for (int64_t g = 0; g < groups; g++) {
        const int64_t at = m * groups + g;
        int8_t *to = p->rounded.numbers + first * inputs + m % TILE4 * 4 + g * group * tile;
        p->rounded.scales[at] = round_inputs(p->x + at * group, group, no_ints(), tile, to, p->rounded.sums + at);
        p->rounded.sums[at] *= p->rounded.scales[at];
    }
}

void round_row(void *argument, int64_t m) {
    const Product *product = argument;
    if (product->matrix->group)
        round_row4(product, m);
    else
        round_row8(product, m);
}

/* Finish and store 16 sums. */
INLINE void store_sums(const Product *p, int64_t row, int64_t o, floats y) {
    const int64_t to = row * p->matrix->outputs + o;
    if (p->matrix->bias) y = add(y, load_floats(p->matrix->bias + o));
    if (p->residual) y = add(y, load_floats(p->residual + to));
    store_floats(p->out + to, p->gelu ? tanh_gelu(y) : y);
}

/* `blocks` blocks of rows [m, m + tile): number b, b + `apart`, ... */
INLINE void tile8(const Product *p, int64_t m, int64_t b, int64_t apart, int tile, int blocks) {
    const Matrix *matrix = p->matrix;
    const int64_t inputs = matrix->inputs, bytes = BLOCK * inputs;
    const int8_t *weights = (const int8_t *)matrix->weights + b * bytes;
    ints sum[SUMS];
    block8(weights, apart * bytes, p->rounded.numbers + m * inputs, inputs, tile, blocks, sum);
    for (int v = 0; v < blocks * PARTS; v++) {
        const int64_t at = (b + v / PARTS * apart) * BLOCK + v % PARTS * LANES;
        const ints shifted = mul_ints(load_ints(matrix->totals + at), int_of(SHIFT));
        const floats scale = load_floats(matrix->scale + at);
        for (int t = 0; t < tile; t++) {
            const floats scales = mul(scale, all(p->rounded.scales[m + t]));
            store_sums(p, m + t, at, mul(to_floats(sub_ints(sum[v * tile + t], shifted)), scales));
        }
    }
}

INLINE void tile4(const Product *p, int64_t m, int64_t b, int64_t apart, int tile, int blocks) {
    const Matrix *matrix = p->matrix;
    const int64_t groups = matrix->inputs / matrix->group, bytes = bytes4(matrix->inputs, matrix->group);
    floats sum[SUMS];
    block4(
        (const uint8_t *)matrix->weights + b * bytes, apart * bytes, p->rounded.numbers + m * matrix->inputs,
        p->rounded.scales + m * groups, p->rounded.sums + m * groups, matrix->inputs, matrix->group, tile, blocks, sum
    );
    for (int v = 0; v < blocks * PARTS; v++)
        for (int t = 0; t < tile; t++)
            store_sums(p, m + t, (b + v / PARTS * apart) * BLOCK + v % PARTS * LANES, sum[v * tile + t]);
}

/* The blocks of an item lie a quarter of the matrix apart, so that the next item reads from where this one ends. What
 * four do not divide is items of one block. */
static int64_t quarter(const Matrix *matrix) { return matrix->outputs / OUTPUTS; }

static int64_t count_blocks(const Matrix *matrix) {
    const int64_t apart = quarter(matrix);
    return apart + (matrix->outputs / BLOCK - apart * BLOCKS);
}

static void multiply8(const Product *p, int64_t item) {
    const int64_t stretches = (p->rows + ROWS8 - 1) / ROWS8, apart = quarter(p->matrix), b = item / stretches;
    const int64_t first = item % stretches * ROWS8, end = least(first + ROWS8, p->rows);
    for (int64_t m = first; m < end; m += TILE8) {
        const int64_t tile = least(end - m, TILE8);
        if (b < apart)
            FOR_EACH_TILE(tile, tile8(p, m, b, apart, T > TILE8 ? TILE8 : T, BLOCKS);)
        else
            FOR_EACH_TILE(tile, tile8(p, m, b + apart * (BLOCKS - 1), 0, T, 1);)
    }
}

static void multiply4(const Product *p, int64_t item) {
    const int64_t apart = quarter(p->matrix);
    if (item >= apart || p->rows > FEW) {
        const int blocks = item < apart ? BLOCKS : 1;
        for (int64_t b = item < apart ? item : item + apart * (BLOCKS - 1), i = 0; i < blocks; i++, b += apart)
            for (int64_t m = 0; m < p->rows; m += TILE4) {
                const int64_t tile = least(p->rows - m, TILE4);
                FOR_EACH_TILE(tile, tile4(p, m, b, 0, T, 1);)
            }
    } else
        FOR_EACH_TILE(p->rows, tile4(p, 0, item, apart, T > FEW ? FEW : T, BLOCKS);)
}

int64_t count_items(const Product *product) {
    const int64_t stretches = product->matrix->group ? product->rows > 0 : (product->rows + ROWS8 - 1) / ROWS8;
    return count_blocks(product->matrix) * stretches;
}

void multiply_item(void *argument, int64_t item) {
    const Product *product = argument;
    if (product->matrix->group)
        multiply4(product, item);
    else
        multiply8(product, item);
}

int64_t count_scales(const Matrix *matrix, int64_t rows) {
    return matrix->group ? rows * (matrix->inputs / matrix->group) : rows;
}

/* out [M, O] = x [M, I] . matrix + bias. Returns 0, or 1 where memory is missing. */
int multiply_rows(const Matrix *matrix, const float *x, float *out, int64_t rows, int threads) {
    const int64_t size = rows * matrix->inputs, scales = count_scales(matrix, rows);
    float *memory = aligned_alloc(LINE, (size + 2 * scales * sizeof(float)) / LINE * LINE + LINE);
    if (!memory) return 1;
    int8_t *numbers = (int8_t *)(memory + 2 * scales);
    Product p = {.matrix = matrix, .x = x, .out = out, .rows = rows, .rounded = {numbers, memory, memory + scales}};
    share_items(round_row, &p, rows, threads);
    share_items(multiply_item, &p, count_items(&p), threads);
    free(memory);
    return 0;
}

/* The same with 8 bits and inputs that are rounded already, by `scales` [M] and plus SHIFT; residual: [M, O], or NULL. */
void multiply_rounded(
    const Matrix *matrix, int8_t *numbers, float *scales, const float *residual, float *out, int64_t rows, int threads
) {
    Product p = {.matrix = matrix, .residual = residual, .out = out, .rows = rows, .rounded = {numbers, scales, NULL}};
    share_items(multiply_item, &p, count_items(&p), threads);
}
