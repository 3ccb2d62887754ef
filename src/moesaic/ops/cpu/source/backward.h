/* Backward in three steps: per block of rows, the gradients of expert input, pre-activation and edge
   weights; then the weight gradients; then the sum over each token's edges.

   The forward pass saved x and the pre-activation; the rest is recomputed. The gradient of an edge's
   weight is <activation, its gradient>, so expert outputs are not saved. */
#ifndef MOESAIC_BACKWARD_H
#define MOESAIC_BACKWARD_H

#include "moe.h"

/* Backward of the activation for hidden values [f, f+columns), from the gradient `s` of the
   activation. `dots` accumulates the edge weight gradients; `g` holds 2 * N_CHUNK floats per row. */
static void activation_rows_backward(const moe_args *m, const row_block *b, float *s, float *g, float *dots, i64 f,
                   i64 columns) {
    int gated = m->width == 2 * m->hidden;
    for (i64 r = 0; r < b->end - b->begin; r++) {
        i64 p = b->begin + r;
        const float *pre = m->pre_activation + p * m->width + f;
        float active[N_CHUNK], *dg = g + r * 2 * N_CHUNK, *dv = dg + N_CHUNK;
        dots[r] += activation_backward((enum activation)m->activation, m->weight[m->edge_of_row[p]], pre,
                                 pre + m->hidden, s + r * N_CHUNK, active, dg, dv, columns);
        if (!m->weighted_activation) continue;
        memcpy(m->weighted_activation + p * m->hidden + f, active, (size_t)columns * 4);
        memcpy(m->grad_pre_activation + p * m->width + f, dg, (size_t)columns * 4);
        if (gated) memcpy(m->grad_pre_activation + p * m->width + m->hidden + f, dv, (size_t)columns * 4);
    }
}

static void backward_block(void *data, i64 task) {
    task_context *context = data;
    const moe_args *m = context->m;
    const row_block *b = context->blocks + task;
    i64 n = b->end - b->begin, gated = m->width == 2 * m->hidden, num_rows = padded_rows(n);
    size_t sizes[] = {(size_t)(num_rows * m->dim), (size_t)(num_rows * m->width), (size_t)(num_rows * N_CHUNK),
                      (size_t)(num_rows * 2 * N_CHUNK), (size_t)num_rows, K_BLOCK * (N_CHUNK + NR)};
    size_t total = 64;
    for (int i = 0; i < 6; i++) total += sizes[i];
    float *y = (float *)thread_scratch(4 * total);
    if (!y) {
        atomic_store(&context->failed, 1);
        return;
    }
    float *h = y + sizes[0], *s = h + sizes[1], *g = s + sizes[2], *dots = g + sizes[3];
    float *pack_buffer = dots + sizes[4];
    matrix_view up = up_matrix(m, b->expert), down = down_matrix(m, b->expert);
    matrix_view rows = {m->grad_out, m->x_dtype, m->dim, m->token_of_row + b->begin};
    matrix_view gates = {g, FLOAT32, 2 * N_CHUNK, NULL}, values = {g + N_CHUNK, FLOAT32, 2 * N_CHUNK, NULL};
    pack_rows(y, n, m->dim, &rows, 0, m->dim, 0);
    memset(dots, 0, (size_t)n * 4);
    for (i64 f = 0; f < m->hidden; f += N_CHUNK) {
        i64 columns = min(N_CHUNK, m->hidden - f);
        packed_gemm(y, n, m->dim, &down, 1, f, columns, s, N_CHUNK, pack_buffer);
        activation_rows_backward(m, b, s, g, dots, f, columns);
        if (!m->grad_x) continue;
        pack_rows(h, n, m->width, &gates, f, columns, 0);
        if (gated) pack_rows(h, n, m->width, &values, m->hidden + f, columns, 0);
    }
    if (m->grad_weight)
        for (i64 r = 0; r < n; r++) m->grad_weight[m->edge_of_row[b->begin + r]] = dots[r];
    for (i64 c = 0; m->grad_x && c < m->dim; c += N_CHUNK) {
        i64 columns = min(N_CHUNK, m->dim - c);
        packed_gemm(h, n, m->width, &up, 1, c, columns, s, N_CHUNK, pack_buffer);
        for (i64 r = 0; r < n; r++)
            memcpy(m->row_buffer + (b->begin + r) * m->dim + c, s + r * N_CHUNK, (size_t)columns * 4);
    }
}

/* Rows [begin, end) of the gradient of one matrix: a sum over the expert's rows in their order, so
   results do not depend on the number of threads. */
static void weight_gradient(void *data, i64 task) {
    task_context *context = data;
    const moe_args *m = context->m;
    const row_block *b = context->blocks + task;
    i64 begin = expert_begin(m, b->expert), depth = m->offsets[b->expert] - begin, n = b->end - b->begin;
    i64 height = b->is_down ? m->hidden : m->dim, columns = b->is_down ? m->dim : m->width;
    i64 size = dtype_size(m->weight_dtype), offset = (b->expert * height + b->begin) * columns;
    char *out = (char *)(b->is_down ? m->grad_down : m->grad_up) + offset * size;
    if (!depth) {
        memset(out, 0, (size_t)(n * columns * size));
        return;
    }
    size_t sizes[] = {(size_t)(padded_rows(n) * depth), (size_t)(padded_rows(n) * N_CHUNK), K_BLOCK * (N_CHUNK + NR)};
    float *a = (float *)thread_scratch(4 * (sizes[0] + sizes[1] + sizes[2] + 64));
    if (!a) {
        atomic_store(&context->failed, 1);
        return;
    }
    float *s = a + sizes[0], *pack_buffer = s + sizes[1];
    const i64 *source = m->token_of_row + begin;
    matrix_view x = {m->x, m->x_dtype, m->dim, source}, y = {m->grad_out, m->x_dtype, m->dim, source};
    matrix_view active = {m->weighted_activation + begin * m->hidden, FLOAT32, m->hidden, NULL};
    matrix_view pre = {m->grad_pre_activation + begin * m->width, FLOAT32, m->width, NULL};
    pack_columns(a, n, depth, b->is_down ? &active : &x, b->begin);
    for (i64 c = 0; c < columns; c += N_CHUNK) {
        i64 some = min(N_CHUNK, columns - c);
        packed_gemm(a, n, depth, b->is_down ? &y : &pre, 0, c, some, s, N_CHUNK, pack_buffer);
        for (i64 r = 0; r < n; r++)
            store_row_nontemporal(out + (r * columns + c) * size, s + r * N_CHUNK, some, (enum dtype)m->weight_dtype);
    }
    store_fence();
}

/* Blocks of both weight gradients of every expert; those of experts without rows are set to zero. */
static row_block *weight_gradient_blocks(const moe_args *m, i64 *count) {
    i64 each = ceil_div(m->dim, MIN_BLOCK_ROWS) + ceil_div(m->hidden, MIN_BLOCK_ROWS) + 2;
    row_block *blocks = malloc(sizeof(row_block) * (size_t)(m->experts * each));
    i64 live = m->offsets[m->experts - 1], total = live * m->dim * (m->width + m->hidden);
    *count = 0;
    for (i64 e = 0; blocks && e < m->experts; e++)
        for (int down = 0; down < 2; down++) {
            if (!(down ? m->grad_down : m->grad_up)) continue;
            i64 n = m->offsets[e] - expert_begin(m, e), height = down ? m->hidden : m->dim;
            i64 cost = (n + 1) * (down ? m->dim : m->width);
            i64 fair = total / (4 * m->threads * cost), cached = (1 << 20) / (n + 1);
            i64 most = max(MIN_BLOCK_ROWS, min(min(fair, cached), MAX_BLOCK_ROWS));
            *count += split_into_blocks(blocks + *count, (row_block){.expert = e, .is_down = down}, height, most, cost);
        }
    if (blocks) qsort(blocks, (size_t)*count, sizeof(row_block), compare_cost_descending);
    return blocks;
}

static void backward_unpermute(void *data, i64 task) {
    task_context *context = data;
    unpermute_sum(context, task, NULL, context->m->grad_x);
}

#endif
