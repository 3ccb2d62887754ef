/* GEMM on packed blocks: C[n, columns] = A[n, depth] B[depth, columns], in float32.

   A is packed in panels of MR rows, B in slivers of NR columns, both in steps of K_BLOCK along depth,
   so that a sliver and a panel fit in the L1 cache. Every element of C is one chain of fused
   multiply-adds over ascending depth, so a different split of the work (threads, batches) gives the
   same bits. */
#ifndef MOESAIC_GEMM_H
#define MOESAIC_GEMM_H

#include "simd.h"

#define K_BLOCK 512
#define N_CHUNK 128 /* columns of a chunk of C: a multiple of NR, and a divisor of K_BLOCK */
#define STREAM_K 8  /* rows of B read at a time when B is not packed */

/* A matrix operand: row r starts at base + (rows ? rows[r] : r) * stride. */
typedef struct {
    const void *base;
    enum dtype dtype;
    i64 stride;
    const i64 *rows;
} matrix_view;

INLINE const void *element_address(const matrix_view *m, i64 r, i64 column) {
    i64 row = m->rows ? m->rows[r] : r;
    return (const char *)m->base + (row * m->stride + column) * dtype_size(m->dtype);
}

INLINE i64 padded_rows(i64 n) { return ceil_div(n, MR) * MR; }

/* Address of the panel of row `r` at depth `k`, in a block of n rows. */
INLINE float *panel_address(float *row_block, i64 n, i64 depth, i64 r, i64 k) {
    i64 step = k / K_BLOCK * K_BLOCK, inside = min(K_BLOCK, depth - step);
    return row_block + step * padded_rows(n) + r / MR * MR * inside + (k - step) * MR;
}

/* Pack `columns` values of MR rows at row r into their panel: the panel is A transposed. */
INLINE void pack_panel(float *to, const matrix_view *a, i64 r, i64 n, i64 column, i64 columns) {
    enum dtype dtype = a->dtype;
    const void *rows[MR];
    for (i64 i = 0; i < MR; i++) rows[i] = element_address(a, min(r + i, n - 1), column);
    i64 k = 0;
    for (; k + 4 <= columns; k += 4)
        for (i64 i = 0; i < MR; i += 4) {
            vec4 t[4];
            for (i64 j = 0; j < 4; j++) {
                const char *row = rows[min(i + j, MR - 1)];
                t[j] = load4(row + k * dtype_size(dtype), dtype);
            }
            transpose4(t);
            for (i64 j = 0; j < 4; j++)
                memcpy(to + (k + j) * MR + i, &t[j], MR - i < 4 ? (MR - i) * 4 : 16);
        }
    for (; k < columns; k++)
        for (i64 i = 0; i < MR; i++) to[k * MR + i] = load_scalar(rows[i], k, dtype);
}

/* Pack columns [k0, k0 + columns) of the n rows of A; `column` is the first of them in `a`. */
static void pack_rows(float *row_block, i64 n, i64 depth, const matrix_view *a, i64 k0, i64 columns,
                      i64 column) {
    for (i64 done = 0; done < columns;) {
        i64 k = k0 + done, step = min(columns - done, K_BLOCK - k % K_BLOCK);
        for (i64 r = 0; r < n; r += MR) {
            float *to = panel_address(row_block, n, depth, r, k);
            if (a->dtype == FLOAT32) {
                matrix_view m = *a;
                m.dtype = FLOAT32;
                pack_panel(to, &m, r, n, column + done, step);
            } else {
                matrix_view m = *a;
                m.dtype = BFLOAT16;
                pack_panel(to, &m, r, n, column + done, step);
            }
        }
        done += step;
    }
}

/* Pack columns [c0, c0 + n) of `a` as the rows of a block: the block is a's transpose. */
static void pack_columns(float *row_block, i64 n, i64 depth, const matrix_view *a, i64 c0) {
    for (i64 k = 0; k < depth; k++) {
        const char *row = element_address(a, k, c0);
        for (i64 r = 0; r < n; r += MR) {
            float *to = panel_address(row_block, n, depth, r, k);
            i64 live = min(MR, n - r);
            if (live == MR && a->dtype == FLOAT32)
                memcpy(to, row + r * 4, MR * 4);
            else
                for (i64 i = 0; i < MR; i++) to[i] = i < live ? load_scalar(row, r + i, a->dtype) : 0;
        }
    }
}

/* Slivers of B rows [k0, k0 + depth), columns [c0, c0 + columns). */
INLINE void pack_b(float *to, const matrix_view *b, i64 k0, i64 depth, i64 c0, i64 columns) {
    i64 full = columns / NR * NR;
    for (i64 k = 0; k < depth; k++) {
        const char *row = element_address(b, k0 + k, c0);
        for (i64 c = 0; c < full; c += NR)
            for (i64 v = 0; v < NR; v += LANES)
                *(vec *)(to + c * depth + k * NR + v) =
                    load_vec(row + (c + v) * dtype_size(b->dtype), b->dtype);
        for (i64 c = full; c < ceil_div(columns, NR) * NR; c++)
            to[full * depth + k * NR + c - full] = c < columns ? load_scalar(row, c, b->dtype) : 0;
    }
}

/* The same of B's transpose: the matrix holds columns of B as its rows. */
INLINE void pack_b_transposed(float *to, const matrix_view *b, i64 k0, i64 depth, i64 c0, i64 columns) {
    for (i64 c = 0; c < ceil_div(columns, NR) * NR; c += 4) {
        float *sliver = to + c / NR * NR * depth + c % NR;
        const char *rows[4];
        for (i64 j = 0; j < 4; j++) rows[j] = element_address(b, min(c0 + c + j, c0 + columns - 1), k0);
        i64 k = 0;
        for (; k + 4 <= depth; k += 4) {
            vec4 t[4];
            for (i64 j = 0; j < 4; j++) t[j] = load4(rows[j] + k * dtype_size(b->dtype), b->dtype);
            transpose4(t);
            for (i64 j = 0; j < 4; j++) *(vec4 *)(sliver + (k + j) * NR) = t[j];
        }
        for (; k < depth; k++)
            for (i64 j = 0; j < 4; j++) sliver[k * NR + j] = load_scalar(rows[j], k, b->dtype);
    }
}

/* m rows by NR columns; `accumulate` adds to C. B's row stride is `ldb`. */
INLINE void micro_kernel(const int m, i64 depth, const float *a, const char *b, i64 ldb, float *c, i64 ldc,
                 const int accumulate, const enum dtype dtype) {
    vec sum[MR][VECTORS];
#pragma GCC unroll 16
    for (int i = 0; i < m; i++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++)
            sum[i][v] = accumulate ? *(const vec *)(c + i * ldc + v * LANES) : (vec){0};
    for (i64 k = 0; k < depth; k++) {
        vec w[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) w[v] = load_vec(b + v * LANES * dtype_size(dtype), dtype);
#pragma GCC unroll 16
        for (int i = 0; i < m; i++)
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) sum[i][v] += a[i] * w[v];
        a += MR;
        b += ldb * dtype_size(dtype);
    }
#pragma GCC unroll 16
    for (int i = 0; i < m; i++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) *(vec *)(c + i * ldc + v * LANES) = sum[i][v];
}

#define CASE(M)                                                                          \
    case M:                                                                              \
        if (M <= MR) {                                                                   \
            if (accumulate) micro_kernel(M <= MR ? M : MR, depth, a, b, ldb, c, ldc, 1, dtype);         \
            else micro_kernel(M <= MR ? M : MR, depth, a, b, ldb, c, ldc, 0, dtype);              \
        }                                                                                \
        break;

#define DEFINE_MICRO_KERNELS(name, KIND)                                                                \
    static void name(i64 m, i64 depth, const float *a, const void *b, i64 ldb, float *c, \
                     i64 ldc, int accumulate) {                                                \
        const enum dtype dtype = KIND;                                                     \
        switch (m) {                                                                     \
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)                              \
            CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)                           \
        }                                                                                \
    }

DEFINE_MICRO_KERNELS(micro_kernel_f32, FLOAT32)
DEFINE_MICRO_KERNELS(micro_kernel_bf16, BFLOAT16)

static void pack_b_dispatch(float *to, const matrix_view *b, int transposed, i64 k0, i64 depth, i64 c0,
                     i64 columns) {
    matrix_view m = *b;
    if (b->dtype == FLOAT32) {
        m.dtype = FLOAT32;
        if (transposed) pack_b_transposed(to, &m, k0, depth, c0, columns);
        else pack_b(to, &m, k0, depth, c0, columns);
    } else {
        m.dtype = BFLOAT16;
        if (transposed) pack_b_transposed(to, &m, k0, depth, c0, columns);
        else pack_b(to, &m, k0, depth, c0, columns);
    }
}

/* C[n, columns] (row stride `ldc`, written in full slivers) from a packed block and columns
   [c0, c0 + columns) of B. `pack_buffer` holds K_BLOCK * ceil(columns / NR) * NR floats. */
static void packed_gemm(const float *row_block, i64 n, i64 depth, const matrix_view *b, int transposed, i64 c0,
                    i64 columns, float *c, i64 ldc, float *pack_buffer) {
    for (i64 k = 0; k < depth; k += K_BLOCK) {
        i64 step = min(K_BLOCK, depth - k);
        pack_b_dispatch(pack_buffer, b, transposed, k, step, c0, columns);
        const float *panels = row_block + k * padded_rows(n);
        for (i64 j = 0; j < columns; j += NR)
            for (i64 r = 0; r < n; r += MR)
                micro_kernel_f32(min(MR, n - r), step, panels + r * step, pack_buffer + j * step, NR,
                           c + r * ldc + j, ldc, k > 0);
    }
}

/* The same for few rows: B is read once, unpacked, all columns of STREAM_K rows at a time. C is
   allocated in full slivers. */
static void streamed_gemm(const float *row_block, i64 n, i64 depth, const matrix_view *b, i64 columns, float *c,
                   i64 ldc, float *pack_buffer) {
    i64 full = columns / NR * NR, size = dtype_size(b->dtype);
    for (i64 k = 0; k < depth; k += STREAM_K) {
        i64 step = min(STREAM_K, depth - k);
        const float *panels = row_block + k / K_BLOCK * K_BLOCK * padded_rows(n);
        i64 stage = min(K_BLOCK, depth - k / K_BLOCK * K_BLOCK), inside = k % K_BLOCK * MR;
        for (i64 j = 0; j < full; j += NR) {
            const char *rows = element_address(b, k, j);
            for (i64 p = 0; p < step; p++)
                __builtin_prefetch(rows + (STREAM_K + p) * b->stride * size);
            for (i64 r = 0; r < n; r += MR) {
                const float *a = panels + r * stage + inside;
                float *to = c + r * ldc + j;
                if (b->dtype == FLOAT32) micro_kernel_f32(min(MR, n - r), step, a, rows, b->stride, to, ldc, k > 0);
                else micro_kernel_bf16(min(MR, n - r), step, a, rows, b->stride, to, ldc, k > 0);
            }
        }
        if (full == columns) continue;
        pack_b_dispatch(pack_buffer, b, 0, k, step, full, columns - full);
        for (i64 r = 0; r < n; r += MR)
            micro_kernel_f32(min(MR, n - r), step, panels + r * stage + inside, pack_buffer, NR,
                       c + r * ldc + full, ldc, k > 0);
    }
}

#endif
