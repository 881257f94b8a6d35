// Vectors as long as the processor's, in GCC's and Clang's C, for `cpu_token.c` and `cpu_draw.c`.

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

static inline floats load(const float *from) {
    floats x;
    memcpy(&x, from, sizeof x);
    return x;
}

static inline void store(float *to, floats x) { memcpy(to, &x, sizeof x); }

static inline floats load_bf16(const uint16_t *from) {
    halves x;
    memcpy(&x, from, sizeof x);
    return (floats)(__builtin_convertvector(x, words) << 16);
}

static inline floats all(float x) { return (floats){0} + x; }

static inline floats choose(ints mask, floats yes, floats no) { return (floats)((mask & (ints)yes) | (~mask & (ints)no)); }

static inline void store_bf16(uint16_t *to, floats x) {  // to the nearest, ties to even
    words bits = (words)choose(x != x, all(NAN), x);  // any other nan may round to 0
    halves rounded = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, halves);
    memcpy(to, &rounded, sizeof rounded);
}

static inline float sum(floats x) {
    for (int n = LANES / 2; n; n /= 2)
        for (int i = 0; i < n; i++) x[i] += x[i + n];
    return x[0];
}

// e^x to 3e-7, from 2^n and a Taylor series, between e^-87 and e^88.
static inline floats exponential(floats x) {
    x = choose(x > 88.0f, all(88.0f), choose(x < -87.0f, all(-87.0f), x));
    ints n = __builtin_convertvector(x * 1.44269504f, ints);
    floats whole = __builtin_convertvector(n, floats);
    floats r = x - whole * 0.693145752f - whole * 1.42860677e-6f, series = all(1.0f);
    for (int i = 10; i; i--) series = 1.0f + series * r * (1.0f / i);
    return series * (floats)((n + 127) << 23);
}

static inline floats silu(floats x) { return x / (1.0f + exponential(-x)); }

static inline floats load_some(const float *from, int64_t left, float other) {
    floats x = all(other);
    if (left >= LANES) return load(from);
    memcpy(&x, from, 4 * left);
    return x;
}

static inline void store_some(float *to, floats x, int64_t left) { memcpy(to, &x, 4 * (left < LANES ? left : LANES)); }

// ln x to 2e-7 for normal x > 0: x = 2^n m with m from sqrt(1/2) to sqrt(2), and ln m = 2 artanh((m - 1) / (m + 1)).
static inline floats logarithm(floats x) {
    ints n = ((ints)x - 0x3f3504f3) >> 23;
    floats m = (floats)((ints)x - (n << 23)), whole = __builtin_convertvector(n, floats);
    floats s = (m - 1.0f) / (m + 1.0f), series = all(0);
    for (int i = 11; i > 0; i -= 2) series = series * s * s + 2.0f / i;
    return whole * 0.693145752f + (whole * 1.42860677e-6f + series * s);
}

static inline float most(floats x) {
    for (int n = LANES / 2; n; n /= 2)
        for (int i = 0; i < n; i++) x[i] = x[i] > x[i + n] ? x[i] : x[i + n];
    return x[0];
}
