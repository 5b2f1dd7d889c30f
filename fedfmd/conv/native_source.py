"""The C that `fedfmd.conv.native` compiles: in a module, as Flower's bundles hold no other code than Python's."""

SOURCE = r"""/* Mixed convolutions whose kernels never leave the cache: what fedfmd/conv/native.py compiles and calls.
 *
 * The bank is walked in tiles of ROWS output channels and DEPTH of their weights. A tile is mixed for each sample
 * in the first cache and multiplied at once with that sample's columns, so that no mixed kernel reaches memory and
 * the bank is read once. Products run over registers of LANES numbers.
 *
 * Arrays are dense. Columns are counted as weights are: column d = (channel, tap) of the image, zero-padded before.
 * The last axis of y and grad is `width`: the positions of the output, with zeros up to a multiple of `lanes()`.
 * Functions return 0, or 1 where memory is short.
 */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifndef REAL
#define REAL float
#endif

#if defined(__AVX512F__)
#define BYTES 64
#define SUMS 16 /* registers that hold sums: half of all, or less */
#elif defined(__AVX__)
#define BYTES 32
#define SUMS 8
#else
#define BYTES 16
#define SUMS 16
#endif
#define LANES ((int)(BYTES / sizeof(REAL)))
#define VECTORS 2 /* registers of a row of sums */
#define ROWS 32
#define DEPTH 64
#define TILE (ROWS * DEPTH)
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

typedef REAL vector __attribute__((vector_size(BYTES), aligned(sizeof(REAL)), may_alias));

typedef struct {
    int64_t batch, channels, height, width; /* of the padded image */
    int64_t kernels, out_channels, tap_rows, tap_columns;
    int64_t row_stride, column_stride, row_dilation, column_dilation;
    int64_t out_height, out_width;
} Shape;

int64_t lanes(void) { return LANES; }

INLINE vector load(const REAL *from) { return *(const vector *)from; }
INLINE void store(REAL *to, vector value) { *(vector *)to = value; }
INLINE void add(REAL *to, vector value) { store(to, load(to) + value); }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE REAL *array(int64_t size) { return malloc((size_t)size * sizeof(REAL)); }
INLINE void clear(REAL *array, int64_t size) { memset(array, 0, (size_t)size * sizeof(REAL)); }

INLINE REAL total(vector value) {
    REAL parts[LANES];
    store(parts, value);
    for (int n = LANES / 2; n; n /= 2)
        for (int i = 0; i < n; i++) parts[i] += parts[i + n];
    return parts[0];
}

INLINE int64_t taps(const Shape *s) { return s->tap_rows * s->tap_columns; }
INLINE int64_t positions(const Shape *s) { return s->out_height * s->out_width; }
INLINE int64_t padded_width(const Shape *s) { return (positions(s) + LANES - 1) / LANES * LANES; }

/* sums[r][v] += sum_i a[r, i] b[i, v], with rows · vectors sums in registers */
INLINE void multiply(const int rows, const int vectors, int64_t depth, const REAL *a, int64_t a_row, int64_t a_column,
                     const REAL *b, int64_t b_row, vector *sums) {
    for (int64_t i = 0; i < depth; i++) {
        vector row[VECTORS];
        UNROLL for (int v = 0; v < vectors; v++) row[v] = load(b + i * b_row + v * LANES);
        UNROLL for (int r = 0; r < rows; r++) {
            REAL factor = a[r * a_row + i * a_column];
            UNROLL for (int v = 0; v < vectors; v++) sums[r * vectors + v] += factor * row[v];
        }
    }
}

INLINE void add_block(const int rows, const int vectors, int64_t depth, const REAL *a, int64_t a_row, int64_t a_column,
                      const REAL *b, int64_t b_row, REAL *c) {
    vector sums[SUMS];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < vectors; v++) sums[r * vectors + v] = load(c + r * b_row + v * LANES);
    multiply(rows, vectors, depth, a, a_row, a_column, b, b_row, sums);
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < vectors; v++) store(c + r * b_row + v * LANES, sums[r * vectors + v]);
}

INLINE void add_rows(const int vectors, int64_t rows, int64_t depth, const REAL *a, int64_t a_row, int64_t a_column,
                     const REAL *b, int64_t b_row, REAL *c) {
    const int step = SUMS / vectors;
    int64_t r = 0;
    for (; r + step <= rows; r += step)
        add_block(step, vectors, depth, a + r * a_row, a_row, a_column, b, b_row, c + r * b_row);
    for (; r < rows; r++) add_block(1, vectors, depth, a + r * a_row, a_row, a_column, b, b_row, c + r * b_row);
}

/* c += a b, of rows × depth and depth × width; rows of b and c lie `width` apart */
INLINE void add_product(int64_t rows, int64_t depth, const REAL *a, int64_t a_row, int64_t a_column, const REAL *b,
                        int64_t width, REAL *c) {
    int64_t j = 0;
    for (; j + VECTORS * LANES <= width; j += VECTORS * LANES)
        add_rows(VECTORS, rows, depth, a, a_row, a_column, b + j, width, c + j);
    for (; j < width; j += LANES) add_rows(1, rows, depth, a, a_row, a_column, b + j, width, c + j);
}

/* tile: kernels × ROWS × DEPTH, zero where the bank has ended */
static void copy_tile(const Shape *s, const REAL *bank, int64_t row, int64_t rows, int64_t first, int64_t depth,
                      REAL *tile) {
    const int64_t length = s->channels * taps(s);
    clear(tile, s->kernels * TILE);
    for (int64_t k = 0; k < s->kernels; k++)
        for (int64_t r = 0; r < rows; r++)
            memcpy(tile + k * TILE + r * DEPTH, bank + (k * s->out_channels + row + r) * length + first,
                   (size_t)depth * sizeof(REAL));
}

INLINE void mix_some(const int64_t kernels, const REAL *pi, const REAL *tile, REAL *mixed) {
    for (int i = 0; i < TILE; i += LANES) {
        vector sum = pi[0] * load(tile + i);
        for (int64_t k = 1; k < kernels; k++) sum += pi[k] * load(tile + k * TILE + i);
        store(mixed + i, sum);
    }
}

/* mixed = sum_k pi_k tile_k */
static void mix(int64_t kernels, const REAL *pi, const REAL *tile, REAL *mixed) {
    if (kernels == 4)
        mix_some(4, pi, tile, mixed); /* the usual number, its loop unrolled */
    else
        mix_some(kernels, pi, tile, mixed);
}

/* Where position j of the output begins in a channel of the image. */
static void find_positions(const Shape *s, int32_t *at) {
    for (int64_t y = 0; y < s->out_height; y++)
        for (int64_t x = 0; x < s->out_width; x++)
            *at++ = (int32_t)(y * s->row_stride * s->width + x * s->column_stride);
}

/* How far from there column first + i reads, and which tap it is. */
static void find_columns(const Shape *s, int64_t first, int64_t depth, int32_t *offset, int32_t *tap) {
    for (int64_t i = 0; i < depth; i++) {
        const int64_t channel = (first + i) / taps(s), t = (first + i) % taps(s);
        const int64_t y = t / s->tap_columns * s->row_dilation, x = t % s->tap_columns * s->column_dilation;
        offset[i] = (int32_t)((channel * s->height + y) * s->width + x);
        tap[i] = (int32_t)t;
    }
}

/* y for output channels `from` to `to`; spatial may be NULL.
 * image: batch × channels × height × width, bank: kernels × out_channels × channels · taps, pi: batch × kernels,
 * spatial: batch × taps, y: batch × out_channels × width. */
int forward(const Shape *s, const REAL *image, const REAL *bank, const REAL *pi, const REAL *spatial, REAL *y,
            int64_t from, int64_t to) {
    const int64_t length = s->channels * taps(s), area = s->height * s->width, width = padded_width(s);
    REAL *columns = array(s->batch * DEPTH * width), *tile = array(s->kernels * TILE), *mixed = array(TILE);
    int32_t *at = malloc((size_t)positions(s) * sizeof(int32_t)), offset[DEPTH], tap[DEPTH];
    const int short_of_memory = !columns || !tile || !mixed || !at;
    if (short_of_memory) goto end;
    find_positions(s, at);
    clear(columns, s->batch * DEPTH * width);
    for (int64_t b = 0; b < s->batch; b++) clear(y + (b * s->out_channels + from) * width, (to - from) * width);
    for (int64_t first = 0; first < length; first += DEPTH) {
        const int64_t depth = least(DEPTH, length - first);
        find_columns(s, first, depth, offset, tap);
        for (int64_t b = 0; b < s->batch; b++)
            for (int64_t i = 0; i < depth; i++) {
                const REAL *source = image + b * s->channels * area + offset[i];
                const REAL factor = spatial ? spatial[b * taps(s) + tap[i]] : 1;
                REAL *column = columns + (b * DEPTH + i) * width;
                for (int64_t j = 0; j < positions(s); j++) column[j] = factor * source[at[j]];
            }
        for (int64_t row = from; row < to; row += ROWS) {
            const int64_t rows = least(ROWS, to - row);
            copy_tile(s, bank, row, rows, first, depth, tile);
            for (int64_t b = 0; b < s->batch; b++) {
                mix(s->kernels, pi + b * s->kernels, tile, mixed);
                add_product(rows, depth, mixed, DEPTH, 1, columns + b * DEPTH * width, width,
                            y + (b * s->out_channels + row) * width);
            }
        }
    }
end:
    free(columns), free(tile), free(mixed), free(at);
    return short_of_memory;
}

/* From the gradient of `rows` mixed rows of a sample, in registers: to those of the tile, of pi and of the rows. */
INLINE void spread_block(const int rows, const Shape *s, const REAL *grad, const REAL *columns, const REAL *pi,
                         const REAL *tile, const REAL *mixed, REAL *dtile, REAL *dpi, REAL *drows) {
    vector sums[SUMS];
    UNROLL for (int i = 0; i < rows * VECTORS; i++) sums[i] = (vector){0};
    multiply(rows, VECTORS, positions(s), grad, padded_width(s), 1, columns, DEPTH, sums);
    for (int64_t k = 0; k < s->kernels; k++) {
        vector dot = {0};
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int v = 0; v < VECTORS; v++) {
                const int64_t i = k * TILE + r * DEPTH + v * LANES;
                add(dtile + i, pi[k] * sums[r * VECTORS + v]);
                dot += load(tile + i) * sums[r * VECTORS + v];
            }
        add(dpi + k * LANES, dot);
    }
    UNROLL for (int r = 0; r < rows; r++) {
        vector dot = {0};
        UNROLL for (int v = 0; v < VECTORS; v++)
            dot += load(mixed + r * DEPTH + v * LANES) * sums[r * VECTORS + v];
        add(drows + r * LANES, dot);
    }
}

static void spread(const Shape *s, int64_t rows, const REAL *grad, const REAL *columns, const REAL *pi,
                   const REAL *tile, const REAL *mixed, REAL *dtile, REAL *dpi, REAL *drows) {
    const int step = SUMS / VECTORS;
    for (int64_t r = 0; r < rows;) {
        const int whole = r + step <= rows;
        for (int64_t i = 0; i < DEPTH; i += VECTORS * LANES) {
            const int64_t at = r * DEPTH + i;
            if (whole)
                spread_block(step, s, grad + r * padded_width(s), columns + i, pi, tile + at, mixed + at, dtile + at,
                             dpi, drows + r * LANES);
            else
                spread_block(1, s, grad + r * padded_width(s), columns + i, pi, tile + at, mixed + at, dtile + at,
                             dpi, drows + r * LANES);
        }
        r += whole ? step : 1;
    }
}

/* The gradients for channels `from` to `to` of the image: parts of dimage and dbank. What is summed over channels
 * is this part's: dpi (batch × kernels), drows (batch × out_channels: <mixed row, its gradient>) and, unless NULL,
 * dspatial (batch × taps). */
int backward(const Shape *s, const REAL *image, const REAL *bank, const REAL *pi, const REAL *spatial,
             const REAL *grad, REAL *dimage, REAL *dbank, REAL *dpi, REAL *drows, REAL *dspatial, int64_t from,
             int64_t to) {
    const int64_t length = s->channels * taps(s), area = s->height * s->width, width = padded_width(s);
    const int64_t n = positions(s), kernels = s->kernels;
    REAL *columns = array(s->batch * n * DEPTH), *dcolumns = array(s->batch * DEPTH * width);
    REAL *tile = array(kernels * TILE), *dtile = array(kernels * TILE), *mixed = array(TILE);
    REAL *pi_sums = array(kernels * LANES), *row_sums = array(ROWS * LANES);
    int32_t *at = malloc((size_t)n * sizeof(int32_t)), offset[DEPTH], tap[DEPTH];
    const int short_of_memory =
        !columns || !dcolumns || !tile || !dtile || !mixed || !pi_sums || !row_sums || !at;
    if (short_of_memory) goto end;
    find_positions(s, at);
    clear(columns, s->batch * n * DEPTH);
    clear(dpi, s->batch * kernels), clear(drows, s->batch * s->out_channels);
    if (dspatial) clear(dspatial, s->batch * taps(s));
    for (int64_t b = 0; b < s->batch; b++) clear(dimage + (b * s->channels + from) * area, (to - from) * area);
    for (int64_t first = from * taps(s); first < to * taps(s); first += DEPTH) {
        const int64_t depth = least(DEPTH, to * taps(s) - first);
        find_columns(s, first, depth, offset, tap);
        for (int64_t b = 0; b < s->batch; b++)
            for (int64_t j = 0; j < n; j++) {
                const REAL *source = image + b * s->channels * area + at[j];
                REAL *row = columns + (b * n + j) * DEPTH;
                for (int64_t i = 0; i < depth; i++) row[i] = source[offset[i]];
                if (spatial)
                    for (int64_t i = 0; i < depth; i++) row[i] *= spatial[b * taps(s) + tap[i]];
            }
        clear(dcolumns, s->batch * DEPTH * width);
        for (int64_t row = 0; row < s->out_channels; row += ROWS) {
            const int64_t rows = least(ROWS, s->out_channels - row);
            copy_tile(s, bank, row, rows, first, depth, tile);
            clear(dtile, kernels * TILE);
            for (int64_t b = 0; b < s->batch; b++) {
                const REAL *g = grad + (b * s->out_channels + row) * width;
                mix(kernels, pi + b * kernels, tile, mixed);
                add_product(DEPTH, rows, mixed, 1, DEPTH, g, width, dcolumns + b * DEPTH * width);
                clear(pi_sums, kernels * LANES), clear(row_sums, ROWS * LANES);
                spread(s, rows, g, columns + b * n * DEPTH, pi + b * kernels, tile, mixed, dtile, pi_sums, row_sums);
                for (int64_t k = 0; k < kernels; k++) dpi[b * kernels + k] += total(load(pi_sums + k * LANES));
                for (int64_t r = 0; r < rows; r++)
                    drows[b * s->out_channels + row + r] += total(load(row_sums + r * LANES));
            }
            for (int64_t k = 0; k < kernels; k++)
                for (int64_t r = 0; r < rows; r++)
                    memcpy(dbank + (k * s->out_channels + row + r) * length + first, dtile + k * TILE + r * DEPTH,
                           (size_t)depth * sizeof(REAL));
        }
        for (int64_t b = 0; b < s->batch; b++)
            for (int64_t i = 0; i < depth; i++) {
                const REAL *column = dcolumns + (b * DEPTH + i) * width;
                const REAL *source = image + b * s->channels * area + offset[i];
                REAL *target = dimage + b * s->channels * area + offset[i];
                const REAL factor = spatial ? spatial[b * taps(s) + tap[i]] : 1;
                for (int64_t j = 0; j < n; j++) target[at[j]] += factor * column[j];
                if (dspatial) {
                    REAL dot = 0;
                    for (int64_t j = 0; j < n; j++) dot += column[j] * source[at[j]];
                    dspatial[b * taps(s) + tap[i]] += dot;
                }
            }
    }
end:
    free(columns), free(dcolumns), free(tile), free(dtile), free(mixed), free(pi_sums), free(row_sums), free(at);
    return short_of_memory;
}
"""
