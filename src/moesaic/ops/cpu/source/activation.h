/* Activations and their derivatives, in loops that the compiler vectorizes.

   A gated activation reads two rows: `g` the gate, `v` the value; the others read `g` only. */
#ifndef MOESAIC_ACTIVATION_H
#define MOESAIC_ACTIVATION_H

#include "simd.h"

enum activation { RELU = 0, SQUARED_RELU = 1, GELU = 2, SWIGLU = 3 };

#define PARTIAL_SUMS 16 /* partial sums of a dot product: a fixed order, independent of the vector width */

/* e^x = 2^n e^r with |r| <= ln(2)/2; the Taylor series to r^7 is within 6e-9 there. */
INLINE float fast_exp(float x) {
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

INLINE float sigmoid(float x) { return 1.0f / (1.0f + fast_exp(-x)); }

/* Normal CDF, given gaussian = e^(-x^2/2): Hastings' five terms (Abramowitz and Stegun 7.1.26),
   within 1e-7. */
INLINE float normal_cdf(float x, float gaussian) {
    float z = (x < 0 ? -x : x) * 0.70710678f;
    float t = 1.0f / (1.0f + 0.3275911f * z);
    float p = 1.061405429f;
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    float tail = 0.5f * p * t * gaussian;
    return x < 0 ? tail : 1.0f - tail;
}

static void activation_forward(enum activation dtype, const float *restrict g, const float *restrict v,
                     float *restrict a, i64 n) {
    if (dtype == RELU)
        for (i64 i = 0; i < n; i++) a[i] = g[i] < 0 ? 0 : g[i]; /* so that NaN stays NaN */
    else if (dtype == SQUARED_RELU)
        for (i64 i = 0; i < n; i++) a[i] = g[i] < 0 ? 0 : g[i] * g[i];
    else if (dtype == GELU)
        for (i64 i = 0; i < n; i++) a[i] = g[i] * normal_cdf(g[i], fast_exp(-0.5f * g[i] * g[i]));
    else
        for (i64 i = 0; i < n; i++) a[i] = g[i] * sigmoid(g[i]) * v[i];
}

/* Backward of one row. In: the pre-activation (g, v), the gradient `d` of the activation
   before its edge's weight `w`. Out: w times the activation in `a`, the gradients of g and v.
   Returns the gradient of the weight, <activation, d>; `d` is overwritten. */
static float activation_backward(enum activation dtype, float w, const float *restrict g,
                           const float *restrict v, float *restrict d, float *restrict a,
                           float *restrict dg, float *restrict dv, i64 n) {
    if (dtype == SWIGLU)
        for (i64 i = 0; i < n; i++) {
            float s = sigmoid(g[i]), gate = g[i] * s, wd = w * d[i];
            a[i] = gate * v[i];
            dv[i] = wd * gate;
            dg[i] = wd * v[i] * (s + gate * (1.0f - s));
        }
    else if (dtype == GELU)
        for (i64 i = 0; i < n; i++) {
            float gaussian = fast_exp(-0.5f * g[i] * g[i]), p = normal_cdf(g[i], gaussian);
            a[i] = g[i] * p;
            dg[i] = w * d[i] * (p + g[i] * gaussian * 0.39894228f);
        }
    else if (dtype == SQUARED_RELU)
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
    float sums[PARTIAL_SUMS] = {0};
    i64 i = 0;
    for (; i + PARTIAL_SUMS <= n; i += PARTIAL_SUMS)
        for (i64 j = 0; j < PARTIAL_SUMS; j++) sums[j] += a[i + j] * d[i + j];
    float dot = 0;
    for (; i < n; i++) dot += a[i] * d[i];
    for (i64 j = 0; j < PARTIAL_SUMS; j++) dot += sums[j];
    for (i = 0; i < n; i++) a[i] *= w;
    return dot;
}

#endif
