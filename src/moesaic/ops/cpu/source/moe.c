/* MoE layer on a CPU: out[t] = sum over edges of weight * down(act(up(x[t]))).

   Plain C without torch headers: it compiles in seconds and is called with addresses. Both passes
   return 0, or 1 if memory is exhausted. */
#include "backward.h"
#include "forward.h"

#define MIN_WORK_PER_THREAD (1 << 21) /* multiply-adds: about 50 microseconds */
#define EXPORT __attribute__((visibility("default")))

static i64 live_rows(const moe_args *m) { return m->offsets[m->experts - 1]; }

/* As many threads as have more work than it takes to wake them. */
static int useful_threads(const moe_args *m) {
    i64 task_function = live_rows(m) * m->dim * (m->width + m->hidden);
    return (int)min(m->threads, 1 + task_function / MIN_WORK_PER_THREAD);
}

EXPORT int moesaic_forward(const moe_args *m) {
    int threads = useful_threads(m);
    i64 count = 0, size = dtype_size((enum dtype)m->x_dtype);
    row_block *blocks = row_blocks(m, &count);
    task_context context = {.m = m, .blocks = blocks, .failed = !blocks};
    if (blocks) {
        if (m->pre_activation) advise_huge_pages(m->pre_activation, (size_t)(live_rows(m) * m->width * 4));
        advise_huge_pages(m->row_buffer, (size_t)(live_rows(m) * m->dim * 4));
        advise_huge_pages(m->out, (size_t)(m->tokens * m->dim * size));
        parallel_for(forward_block, &context, count, threads);
        parallel_for(forward_unpermute, &context, ceil_div(m->tokens, TOKENS_PER_TASK), threads);
    }
    free(blocks);
    return atomic_load(&context.failed);
}

EXPORT int moesaic_backward(const moe_args *m) {
    int threads = useful_threads(m);
    i64 count = 0, num_gradients = 0, size = dtype_size((enum dtype)m->weight_dtype);
    i64 weight_bytes = m->experts * m->dim * size;
    row_block *blocks = row_blocks(m, &count), *gradients = weight_gradient_blocks(m, &num_gradients);
    task_context rows = {.m = m, .blocks = blocks, .failed = !blocks};
    task_context matrices = {.m = m, .blocks = gradients, .failed = !gradients};
    if (blocks && gradients) {
        if (m->weighted_activation) advise_huge_pages(m->weighted_activation, (size_t)(live_rows(m) * m->hidden * 4));
        if (m->grad_pre_activation) advise_huge_pages(m->grad_pre_activation, (size_t)(live_rows(m) * m->width * 4));
        if (m->grad_x) advise_huge_pages(m->row_buffer, (size_t)(live_rows(m) * m->dim * 4));
        if (m->grad_up) advise_huge_pages(m->grad_up, (size_t)(weight_bytes * m->width));
        if (m->grad_down) advise_huge_pages(m->grad_down, (size_t)(weight_bytes * m->hidden));
        parallel_for(backward_block, &rows, count, threads);
        parallel_for(weight_gradient, &matrices, num_gradients, threads);
        if (m->grad_x) parallel_for(backward_unpermute, &rows, ceil_div(m->tokens, TOKENS_PER_TASK), threads);
    }
    free(blocks);
    free(gradients);
    return atomic_load(&rows.failed) || atomic_load(&matrices.failed);
}
