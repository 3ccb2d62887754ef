/* SIMD vectors of the widest type that the target has, and loads and stores of two dtypes.

   The micro-kernel tile of MR rows and NR columns fills the registers: MR * NR / LANES accumulators,
   the vectors of one row of B, one value of A. */
#ifndef MOESAIC_SIMD_H
#define MOESAIC_SIMD_H

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#define MR 12
#define VECTORS 2
#elif defined(__AVX__)
#define LANES 8
#define MR 6
#define VECTORS 2
#else /* 128 bits: NEON with 32 registers, SSE with 16 */
#define LANES 4
#if defined(__aarch64__)
#define MR 6
#define VECTORS 4
#else
#define MR 6
#define VECTORS 2
#endif
#endif

#define NR (LANES * VECTORS)
#define INLINE static inline __attribute__((always_inline))

typedef int64_t i64;
typedef float vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t vec_bits __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint16_t vec_u16 __attribute__((vector_size(LANES * 2), aligned(2), may_alias));
typedef float vec4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef int vec4_i32 __attribute__((vector_size(16)));
typedef uint32_t vec4_u32 __attribute__((vector_size(16), aligned(4), may_alias));
typedef uint16_t vec4_u16 __attribute__((vector_size(8), aligned(2), may_alias));

enum dtype { FLOAT32 = 0, BFLOAT16 = 1 };

#if defined(__clang__)
#define SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, (vec4_i32){i, j, k, l})
#endif

INLINE i64 dtype_size(enum dtype dtype) { return dtype == BFLOAT16 ? 2 : 4; }

INLINE i64 min(i64 a, i64 b) { return a < b ? a : b; }

INLINE i64 max(i64 a, i64 b) { return a > b ? a : b; }

INLINE i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }

INLINE float load_scalar(const void *p, i64 i, enum dtype dtype) {
    if (dtype == FLOAT32) return ((const float *)p)[i];
    uint32_t bits = (uint32_t)((const uint16_t *)p)[i] << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE vec load_vec(const void *p, enum dtype dtype) {
    if (dtype == FLOAT32) return *(const vec *)p;
    return (vec)(__builtin_convertvector(*(const vec_u16 *)p, vec_bits) << 16);
}

INLINE vec4 load4(const void *p, enum dtype dtype) {
    if (dtype == FLOAT32) return *(const vec4 *)p;
    return (vec4)(__builtin_convertvector(*(const vec4_u16 *)p, vec4_u32) << 16);
}

INLINE void transpose4(vec4 r[4]) {
    vec4 a = SHUFFLE(r[0], r[1], 0, 4, 1, 5), b = SHUFFLE(r[0], r[1], 2, 6, 3, 7);
    vec4 c = SHUFFLE(r[2], r[3], 0, 4, 1, 5), d = SHUFFLE(r[2], r[3], 2, 6, 3, 7);
    r[0] = SHUFFLE(a, c, 0, 1, 4, 5);
    r[1] = SHUFFLE(a, c, 2, 3, 6, 7);
    r[2] = SHUFFLE(b, d, 0, 1, 4, 5);
    r[3] = SHUFFLE(b, d, 2, 3, 6, 7);
}

/* Round to the nearest bfloat16, ties to even; NaN stays NaN. */
INLINE uint16_t to_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)(value != value ? 0x7fc0 : rounded);
}

INLINE void store_row(void *to, const float *from, i64 n, enum dtype dtype) {
    if (dtype == FLOAT32)
        memcpy(to, from, (size_t)n * 4);
    else
        for (i64 i = 0; i < n; i++) ((uint16_t *)to)[i] = to_bfloat16(from[i]);
}

/* The same for data that is not read soon: non-temporal stores where the CPU has them. */
INLINE void store_row_nontemporal(void *to, const float *from, i64 n, enum dtype dtype) {
#if defined(__AVX__)
    if (dtype == FLOAT32 && ((uintptr_t)to & 31) == 0) {
        typedef float eight __attribute__((vector_size(32), aligned(4), may_alias));
        i64 i = 0;
        for (; i + 8 <= n; i += 8)
            __builtin_ia32_movntps256((float *)to + i, *(const eight *)(from + i));
        for (; i < n; i++) ((float *)to)[i] = from[i];
        return;
    }
#endif
    store_row(to, from, n, dtype);
}

/* Order non-temporal stores before later stores. */
INLINE void store_fence(void) {
#if defined(__AVX__)
    __builtin_ia32_sfence();
#endif
}

#endif
