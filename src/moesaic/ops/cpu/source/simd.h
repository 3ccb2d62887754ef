/* Vectors of the widest kind that the compiler was told the machine has, and numbers of two types.

   MR rows times NR columns is the tile that fills the registers: MR * NR / LANES accumulators, the
   vectors of one row of B, one value of A. */
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
typedef uint16_t vec_half __attribute__((vector_size(LANES * 2), aligned(2), may_alias));
typedef float four __attribute__((vector_size(16), aligned(4), may_alias));
typedef int four_ints __attribute__((vector_size(16)));
typedef uint32_t four_bits __attribute__((vector_size(16), aligned(4), may_alias));
typedef uint16_t four_halves __attribute__((vector_size(8), aligned(2), may_alias));

enum kind { FLOAT32 = 0, BFLOAT16 = 1 };

#if defined(__clang__)
#define MIX(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define MIX(a, b, i, j, k, l) __builtin_shuffle(a, b, (four_ints){i, j, k, l})
#endif

INLINE i64 size_of(enum kind kind) { return kind == BFLOAT16 ? 2 : 4; }

INLINE i64 min(i64 a, i64 b) { return a < b ? a : b; }

INLINE i64 max(i64 a, i64 b) { return a > b ? a : b; }

INLINE i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }

INLINE float get(const void *p, i64 i, enum kind kind) {
    if (kind == FLOAT32) return ((const float *)p)[i];
    uint32_t bits = (uint32_t)((const uint16_t *)p)[i] << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE vec load(const void *p, enum kind kind) {
    if (kind == FLOAT32) return *(const vec *)p;
    return (vec)(__builtin_convertvector(*(const vec_half *)p, vec_bits) << 16);
}

INLINE four load4(const void *p, enum kind kind) {
    if (kind == FLOAT32) return *(const four *)p;
    return (four)(__builtin_convertvector(*(const four_halves *)p, four_bits) << 16);
}

INLINE void transpose4(four r[4]) {
    four a = MIX(r[0], r[1], 0, 4, 1, 5), b = MIX(r[0], r[1], 2, 6, 3, 7);
    four c = MIX(r[2], r[3], 0, 4, 1, 5), d = MIX(r[2], r[3], 2, 6, 3, 7);
    r[0] = MIX(a, c, 0, 1, 4, 5);
    r[1] = MIX(a, c, 2, 3, 6, 7);
    r[2] = MIX(b, d, 0, 1, 4, 5);
    r[3] = MIX(b, d, 2, 3, 6, 7);
}

/* Round to the nearest bfloat16, ties to even; what is not a number stays none. */
INLINE uint16_t to_half(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)(value != value ? 0x7fc0 : rounded);
}

INLINE void put_row(void *to, const float *from, i64 n, enum kind kind) {
    if (kind == FLOAT32)
        memcpy(to, from, (size_t)n * 4);
    else
        for (i64 i = 0; i < n; i++) ((uint16_t *)to)[i] = to_half(from[i]);
}

/* The same for what nobody reads soon: past the caches where the machine has a way. */
INLINE void put_row_once(void *to, const float *from, i64 n, enum kind kind) {
#if defined(__AVX__)
    if (kind == FLOAT32 && ((uintptr_t)to & 31) == 0) {
        typedef float eight __attribute__((vector_size(32), aligned(4), may_alias));
        i64 i = 0;
        for (; i + 8 <= n; i += 8)
            __builtin_ia32_movntps256((float *)to + i, *(const eight *)(from + i));
        for (; i < n; i++) ((float *)to)[i] = from[i];
        return;
    }
#endif
    put_row(to, from, n, kind);
}

/* Make what was written past the caches visible before another thread is told of it. */
INLINE void settle(void) {
#if defined(__AVX__)
    __builtin_ia32_sfence();
#endif
}

#endif
