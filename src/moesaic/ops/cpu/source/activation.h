/* Activations and their derivatives, in loops that the compiler turns into vectors.

   A gated activation reads two rows: `g` the gate, `v` the value; the others read `g` alone. */
#ifndef MOESAIC_ACTIVATION_H
#define MOESAIC_ACTIVATION_H

#include "simd.h"

enum activation { RELU = 0, SQUARED_RELU = 1, GELU = 2, SWIGLU = 3 };

#define SUMS 16 /* partial sums of a dot product: a fixed order, whatever the vectors are */

/* e^x = 2^n e^r with |r| <= ln(2)/2; the Taylor series to r^7 is within 6e-9 there. */
INLINE float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float shifted = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: the low bits become n */
    float n = shifted - 12582912.0f;
    float r = x - n * 0.693359375f + n * 2.12194440e-4f; /* ln(2) in two parts */
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    uint32_t bits, power;
    memcpy(&bits, &p, 4);
    memcpy(&power, &shifted, 4);
    bits += power << 23;
    memcpy(&p, &bits, 4);
    return p;
}

INLINE float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

/* The normal distribution function, given bell = e^(-x^2/2): Hastings' five terms (Abramowitz and
   Stegun 7.1.26), within 1e-7. */
INLINE float normal(float x, float bell) {
    float z = (x < 0 ? -x : x) * 0.70710678f;
    float t = 1.0f / (1.0f + 0.3275911f * z);
    float p = 1.061405429f;
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    float tail = 0.5f * p * t * bell;
    return x < 0 ? tail : 1.0f - tail;
}

static void activate(enum activation kind, const float *restrict g, const float *restrict v,
                     float *restrict a, i64 n) {
    if (kind == RELU)
        for (i64 i = 0; i < n; i++) a[i] = g[i] < 0 ? 0 : g[i]; /* so that NaN stays NaN */
    else if (kind == SQUARED_RELU)
        for (i64 i = 0; i < n; i++) a[i] = g[i] < 0 ? 0 : g[i] * g[i];
    else if (kind == GELU)
        for (i64 i = 0; i < n; i++) a[i] = g[i] * normal(g[i], exponential(-0.5f * g[i] * g[i]));
    else
        for (i64 i = 0; i < n; i++) a[i] = g[i] * sigmoid(g[i]) * v[i];
}

/* One row of the way back. In: the pre-activation (g, v), the gradient `d` of the activation
   before its edge's weight `w`. Out: w times the activation in `a`, the gradients of g and v.
   Returns the gradient of the weight, <activation, d>; `d` is overwritten. */
static float activate_back(enum activation kind, float w, const float *restrict g,
                           const float *restrict v, float *restrict d, float *restrict a,
                           float *restrict dg, float *restrict dv, i64 n) {
    if (kind == SWIGLU)
        for (i64 i = 0; i < n; i++) {
            float s = sigmoid(g[i]), gate = g[i] * s, wd = w * d[i];
            a[i] = gate * v[i];
            dv[i] = wd * gate;
            dg[i] = wd * v[i] * (s + gate * (1.0f - s));
        }
    else if (kind == GELU)
        for (i64 i = 0; i < n; i++) {
            float bell = exponential(-0.5f * g[i] * g[i]), p = normal(g[i], bell);
            a[i] = g[i] * p;
            dg[i] = w * d[i] * (p + g[i] * bell * 0.39894228f);
        }
    else if (kind == SQUARED_RELU)
        for (i64 i = 0; i < n; i++) {
            float r = g[i] < 0 ? 0 : g[i];
            a[i] = r * r;
            dg[i] = w * d[i] * 2.0f * r;
        }
    else
        for (i64 i = 0; i < n; i++) {
            a[i] = g[i] < 0 ? 0 : g[i];
            dg[i] = g[i] <= 0 ? 0 : w * d[i];
        }
    float sums[SUMS] = {0};
    i64 i = 0;
    for (; i + SUMS <= n; i += SUMS)
        for (i64 j = 0; j < SUMS; j++) sums[j] += a[i + j] * d[i + j];
    float dot = 0;
    for (; i < n; i++) dot += a[i] * d[i];
    for (i64 j = 0; j < SUMS; j++) dot += sums[j];
    for (i = 0; i < n; i++) a[i] *= w;
    return dot;
}

#endif
