/* Products of packed blocks: C[n, columns] = A[n, depth] B[depth, columns], in float32.

   A lies in panels of MR rows, B in slivers of NR columns, both with `depth` in steps of DEPTH, so
   that a sliver and a panel stay in the nearest cache. Every element of C is one chain of fused
   multiply-adds over ascending depth, whatever the blocks are: cutting the work differently
   (threads, batches) changes no bit of it. */
#ifndef MOESAIC_PRODUCT_H
#define MOESAIC_PRODUCT_H

#include "simd.h"

#define DEPTH 512
#define WIDE 128        /* columns of a chunk of C: whole slivers, and a divisor of DEPTH */
#define STREAM_DEPTH 8 /* rows of B read side by side when B is used where it lies */

/* A matrix that is read: row r starts at base + (rows ? rows[r] : r) * stride. */
typedef struct {
    const void *base;
    enum kind kind;
    i64 stride;
    const i64 *rows;
} matrix;

INLINE const void *row_of(const matrix *m, i64 r, i64 column) {
    i64 row = m->rows ? m->rows[r] : r;
    return (const char *)m->base + (row * m->stride + column) * size_of(m->kind);
}

INLINE i64 padded(i64 n) { return ceil_div(n, MR) * MR; }

/* Where the panel of row `r` begins at depth `k`, in a block of n rows. */
INLINE float *panel_at(float *block, i64 n, i64 depth, i64 r, i64 k) {
    i64 step = k / DEPTH * DEPTH, inside = min(DEPTH, depth - step);
    return block + step * padded(n) + r / MR * MR * inside + (k - step) * MR;
}

/* Pack `columns` values of MR rows at row r into their panel: the panel is A transposed. */
INLINE void pack_panel(float *to, const matrix *a, i64 r, i64 n, i64 column, i64 columns) {
    enum kind kind = a->kind;
    const void *rows[MR];
    for (i64 i = 0; i < MR; i++) rows[i] = row_of(a, min(r + i, n - 1), column);
    i64 k = 0;
    for (; k + 4 <= columns; k += 4)
        for (i64 i = 0; i < MR; i += 4) {
            four t[4];
            for (i64 j = 0; j < 4; j++) {
                const char *row = rows[min(i + j, MR - 1)];
                t[j] = load4(row + k * size_of(kind), kind);
            }
            transpose4(t);
            for (i64 j = 0; j < 4; j++)
                memcpy(to + (k + j) * MR + i, &t[j], MR - i < 4 ? (MR - i) * 4 : 16);
        }
    for (; k < columns; k++)
        for (i64 i = 0; i < MR; i++) to[k * MR + i] = get(rows[i], k, kind);
}

/* Pack columns [k0, k0 + columns) of the n rows of A; `column` is where they begin in `a`. */
static void pack_rows(float *block, i64 n, i64 depth, const matrix *a, i64 k0, i64 columns,
                      i64 column) {
    for (i64 done = 0; done < columns;) {
        i64 k = k0 + done, step = min(columns - done, DEPTH - k % DEPTH);
        for (i64 r = 0; r < n; r += MR) {
            float *to = panel_at(block, n, depth, r, k);
            if (a->kind == FLOAT32) {
                matrix m = *a;
                m.kind = FLOAT32;
                pack_panel(to, &m, r, n, column + done, step);
            } else {
                matrix m = *a;
                m.kind = BFLOAT16;
                pack_panel(to, &m, r, n, column + done, step);
            }
        }
        done += step;
    }
}

/* Pack columns [c0, c0 + n) of `a` as the rows of a block: the block is a's transpose. */
static void pack_columns(float *block, i64 n, i64 depth, const matrix *a, i64 c0) {
    for (i64 k = 0; k < depth; k++) {
        const char *row = row_of(a, k, c0);
        for (i64 r = 0; r < n; r += MR) {
            float *to = panel_at(block, n, depth, r, k);
            i64 live = min(MR, n - r);
            if (live == MR && a->kind == FLOAT32)
                memcpy(to, row + r * 4, MR * 4);
            else
                for (i64 i = 0; i < MR; i++) to[i] = i < live ? get(row, r + i, a->kind) : 0;
        }
    }
}

/* Slivers of B rows [k0, k0 + depth), columns [c0, c0 + columns). */
INLINE void pack_b(float *to, const matrix *b, i64 k0, i64 depth, i64 c0, i64 columns) {
    i64 whole = columns / NR * NR;
    for (i64 k = 0; k < depth; k++) {
        const char *row = row_of(b, k0 + k, c0);
        for (i64 c = 0; c < whole; c += NR)
            for (i64 v = 0; v < NR; v += LANES)
                *(vec *)(to + c * depth + k * NR + v) =
                    load(row + (c + v) * size_of(b->kind), b->kind);
        for (i64 c = whole; c < ceil_div(columns, NR) * NR; c++)
            to[whole * depth + k * NR + c - whole] = c < columns ? get(row, c, b->kind) : 0;
    }
}

/* The same of B's transpose: the matrix holds columns of B as its rows. */
INLINE void pack_b_transposed(float *to, const matrix *b, i64 k0, i64 depth, i64 c0, i64 columns) {
    for (i64 c = 0; c < ceil_div(columns, NR) * NR; c += 4) {
        float *sliver = to + c / NR * NR * depth + c % NR;
        const char *rows[4];
        for (i64 j = 0; j < 4; j++) rows[j] = row_of(b, min(c0 + c + j, c0 + columns - 1), k0);
        i64 k = 0;
        for (; k + 4 <= depth; k += 4) {
            four t[4];
            for (i64 j = 0; j < 4; j++) t[j] = load4(rows[j] + k * size_of(b->kind), b->kind);
            transpose4(t);
            for (i64 j = 0; j < 4; j++) *(four *)(sliver + (k + j) * NR) = t[j];
        }
        for (; k < depth; k++)
            for (i64 j = 0; j < 4; j++) sliver[k * NR + j] = get(rows[j], k, b->kind);
    }
}

/* m rows by NR columns; `more` adds to what C holds. B's rows are `ldb` apart. */
INLINE void tile(const int m, i64 depth, const float *a, const char *b, i64 ldb, float *c, i64 ldc,
                 const int more, const enum kind kind) {
    vec sum[MR][VECTORS];
#pragma GCC unroll 16
    for (int i = 0; i < m; i++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++)
            sum[i][v] = more ? *(const vec *)(c + i * ldc + v * LANES) : (vec){0};
    for (i64 k = 0; k < depth; k++) {
        vec w[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) w[v] = load(b + v * LANES * size_of(kind), kind);
#pragma GCC unroll 16
        for (int i = 0; i < m; i++)
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) sum[i][v] += a[i] * w[v];
        a += MR;
        b += ldb * size_of(kind);
    }
#pragma GCC unroll 16
    for (int i = 0; i < m; i++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) *(vec *)(c + i * ldc + v * LANES) = sum[i][v];
}

#define CASE(M)                                                                          \
    case M:                                                                              \
        if (M <= MR) {                                                                   \
            if (more) tile(M <= MR ? M : MR, depth, a, b, ldb, c, ldc, 1, kind);         \
            else tile(M <= MR ? M : MR, depth, a, b, ldb, c, ldc, 0, kind);              \
        }                                                                                \
        break;

#define TILES(name, KIND)                                                                \
    static void name(i64 m, i64 depth, const float *a, const void *b, i64 ldb, float *c, \
                     i64 ldc, int more) {                                                \
        const enum kind kind = KIND;                                                     \
        switch (m) {                                                                     \
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)                              \
            CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)                           \
        }                                                                                \
    }

TILES(tile_float, FLOAT32)
TILES(tile_half, BFLOAT16)

static void pack_any(float *to, const matrix *b, int transposed, i64 k0, i64 depth, i64 c0,
                     i64 columns) {
    matrix m = *b;
    if (b->kind == FLOAT32) {
        m.kind = FLOAT32;
        if (transposed) pack_b_transposed(to, &m, k0, depth, c0, columns);
        else pack_b(to, &m, k0, depth, c0, columns);
    } else {
        m.kind = BFLOAT16;
        if (transposed) pack_b_transposed(to, &m, k0, depth, c0, columns);
        else pack_b(to, &m, k0, depth, c0, columns);
    }
}

/* C[n, columns] (rows `ldc` apart, written in whole slivers) from a packed block and columns
   [c0, c0 + columns) of B. `room` holds DEPTH * ceil(columns / NR) * NR floats. */
static void product(const float *block, i64 n, i64 depth, const matrix *b, int transposed, i64 c0,
                    i64 columns, float *c, i64 ldc, float *room) {
    for (i64 k = 0; k < depth; k += DEPTH) {
        i64 step = min(DEPTH, depth - k);
        pack_any(room, b, transposed, k, step, c0, columns);
        const float *panels = block + k * padded(n);
        for (i64 j = 0; j < columns; j += NR)
            for (i64 r = 0; r < n; r += MR)
                tile_float(min(MR, n - r), step, panels + r * step, room + j * step, NR,
                           c + r * ldc + j, ldc, k > 0);
    }
}

/* The same for few rows: B is read once, where it lies, all columns of STREAM_DEPTH rows at a
   time. C has room for whole slivers. */
static void stream(const float *block, i64 n, i64 depth, const matrix *b, i64 columns, float *c,
                   i64 ldc, float *room) {
    i64 whole = columns / NR * NR, size = size_of(b->kind);
    for (i64 k = 0; k < depth; k += STREAM_DEPTH) {
        i64 step = min(STREAM_DEPTH, depth - k);
        const float *panels = block + k / DEPTH * DEPTH * padded(n);
        i64 stage = min(DEPTH, depth - k / DEPTH * DEPTH), inside = k % DEPTH * MR;
        for (i64 j = 0; j < whole; j += NR) {
            const char *rows = row_of(b, k, j);
            for (i64 p = 0; p < step; p++)
                __builtin_prefetch(rows + (STREAM_DEPTH + p) * b->stride * size);
            for (i64 r = 0; r < n; r += MR) {
                const float *a = panels + r * stage + inside;
                float *to = c + r * ldc + j;
                if (b->kind == FLOAT32) tile_float(min(MR, n - r), step, a, rows, b->stride, to, ldc, k > 0);
                else tile_half(min(MR, n - r), step, a, rows, b->stride, to, ldc, k > 0);
            }
        }
        if (whole == columns) continue;
        pack_any(room, b, 0, k, step, whole, columns - whole);
        for (i64 r = 0; r < n; r += MR)
            tile_float(min(MR, n - r), step, panels + r * stage + inside, room, NR,
                       c + r * ldc + whole, ldc, k > 0);
    }
}

#endif
