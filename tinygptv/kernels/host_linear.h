/* Products of rows with an 8-bit or a 4-bit matrix, in items that threads share (host_linear.c).
 *
 * Notation: M rows of the input, I input width, O output width, G inputs that share a 4-bit scale. */
#pragma once

#include <stdint.h>

/* A matrix in the order in which it is read. */
typedef struct {
    const void *weights;
    const float *scale;    /* 8 bits: [O] */
    const int32_t *totals; /* 8 bits: [O], sum of each output's weights */
    const float *bias;     /* [O], or NULL */
    int64_t inputs, outputs, group; /* multiples of 16. `group` inputs share a 4-bit scale; 0: 8 bits */
} Matrix;

/* Inputs as integers. 8 bits: [M, I] and [M]; 4 bits: the same in tiles, and [M, I / G], `sums` those of the inputs. */
typedef struct {
    int8_t *numbers;
    float *scales, *sums;
} Rounded;

/* out [M, O] = x . matrix + bias + residual, or the tanh GELU of that. */
typedef struct {
    const Matrix *matrix;
    const float *x, *residual; /* [M, I]; [M, O], or NULL */
    float *out;
    int64_t rows;
    int gelu;
    Rounded rounded;
} Product;

/* Scales that rounded inputs have. */
int64_t count_scales(const Matrix *matrix, int64_t rows);

/* Round row m of x. */
void round_row(void *product, int64_t m);

/* Items of a product whose inputs are rounded, and the work of one. */
int64_t count_items(const Product *product);
void multiply_item(void *product, int64_t item);
