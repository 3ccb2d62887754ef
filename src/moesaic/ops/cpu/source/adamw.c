/* AdamW over many tensors in one call.

   Compiled without contraction of products and sums into fused operations: every value is rounded as
   by the separate operations of moesaic.ops.adamw, whatever its place in a tensor, the CPU and the
   number of threads. So a tensor that is updated in parts has the bits of one that is updated whole. */
#include <math.h>

#include "thread_pool.h"

#define CHUNK ((i64)1 << 14) /* values of a task: its 28 bytes each are a few pages */
#define MIN_PER_THREAD ((i64)1 << 16)
#define EXPORT __attribute__((visibility("default")))

/* Every member before the factors takes eight bytes; moesaic/ops/cpu/cpu_adamw.py has the same list. */
typedef struct {
    float *param;                /* float32, the master copy if `rounded` is given */
    const void *grad;            /* of grad_dtype */
    float *exp_avg, *exp_avg_sq;
    uint16_t *rounded;           /* bfloat16 output, or NULL */
    i64 size, grad_dtype;
    float grad_scale, decay, first, beta2, second, correction, eps, step_size;
} adamw_tensor;

typedef struct {
    const adamw_tensor *tensors;
    const i64 *first_task; /* [tensors + 1] */
    i64 count;
} adamw_context;

INLINE void update(const adamw_tensor *t, i64 begin, i64 end, enum dtype grad_dtype, int rounds) {
    float *restrict param = t->param, *restrict m = t->exp_avg, *restrict v = t->exp_avg_sq;
    uint16_t *restrict rounded = t->rounded;
    const void *restrict grad = t->grad;
    const float scale = t->grad_scale, decay = t->decay, first = t->first, beta2 = t->beta2;
    const float second = t->second, correction = t->correction, eps = t->eps, size = t->step_size;
    for (i64 i = begin; i < end; i++) {
        float g = load_scalar(grad, i, grad_dtype) * scale;
        float mean = m[i] + (g - m[i]) * first;
        float square = v[i] * beta2 + (g * second) * g;
        float p = param[i] * decay - (mean * size) / (sqrtf(square) / correction + eps);
        m[i] = mean, v[i] = square, param[i] = p;
        if (rounds) rounded[i] = to_bfloat16(p);
    }
}

static void update_chunk(void *context, i64 task) {
    const adamw_context *c = context;
    i64 low = 0, high = c->count; /* the last tensor whose first task is at most `task` */
    while (high - low > 1) {
        i64 middle = (low + high) / 2;
        if (c->first_task[middle] <= task)
            low = middle;
        else
            high = middle;
    }
    const adamw_tensor *t = c->tensors + low;
    i64 begin = (task - c->first_task[low]) * CHUNK, end = min(t->size, begin + CHUNK);
    if (t->grad_dtype == FLOAT32 && !t->rounded)
        update(t, begin, end, FLOAT32, 0);
    else if (t->grad_dtype == FLOAT32)
        update(t, begin, end, FLOAT32, 1);
    else if (!t->rounded)
        update(t, begin, end, BFLOAT16, 0);
    else
        update(t, begin, end, BFLOAT16, 1);
}

/* Returns 0, or 1 if memory is exhausted. */
EXPORT int moesaic_adamw(const adamw_tensor *tensors, i64 count, i64 threads) {
    i64 *first_task = malloc(sizeof(i64) * (size_t)(count + 1)), tasks = 0, values = 0;
    if (!first_task) return 1;
    for (i64 i = 0; i < count; i++) {
        first_task[i] = tasks;
        tasks += ceil_div(tensors[i].size, CHUNK);
        values += tensors[i].size;
    }
    first_task[count] = tasks;
    adamw_context context = {tensors, first_task, count};
    parallel_for(update_chunk, &context, tasks, (int)min(threads, 1 + values / MIN_PER_THREAD));
    free(first_task);
    return 0;
}
