// A draw from one row's logits on a CPU: `generation.sampling.draw` in a few passes, where PyTorch's operators take thirty.

#include "cpu_vectors.h"

// The first of the largest of x; -1 where one is nan, or the largest is no finite number.
static int64_t first_of_largest(const float *x, int64_t n) {
    floats best = all(-INFINITY);
    ints bad = {0};
    for (int64_t i = 0; i < n; i += LANES) {
        floats part = load_some(x + i, n - i, -INFINITY);
        best = choose(part > best, part, best);
        bad |= part != part;
    }
    for (int i = 0; i < LANES; i++)
        if (bad[i]) return -1;
    float largest = most(best);
    int64_t at = 0;
    if (!isfinite(largest)) return -1;
    while (x[at] != largest) at++;
    return at;
}

// How many tokens are better than one of logit x, and their mass; the others' noisy scores go to -inf if `leave`.
static void betters(const float *logits, float *noisy, int64_t n, float x, int64_t token, float best, float temperature,
                    int leave, int64_t *count, float *mass) {
    floats total = all(0);
    ints ahead = {0}, place;
    for (int i = 0; i < LANES; i++) place[i] = i;
    for (int64_t i = 0; i < n; i += LANES, place += LANES) {
        floats part = load_some(logits + i, n - i, -INFINITY);
        ints better = (part > x) | ((part == x) & (place < (int32_t)token));
        ahead -= better;
        total += choose(better, exponential((part - best) / temperature), all(0));
        if (leave) store_some(noisy + i, choose(better, load_some(noisy + i, n - i, 0), all(-INFINITY)), n - i);
    }
    *count = 0, *mass = sum(total);
    for (int i = 0; i < LANES; i++) *count += ahead[i];
}

// The mass of the k best: floats as integers of the same order are halved until k of them reach the bound, k + 1 would not.
static float mass_of_best(const float *logits, int64_t n, int64_t k, float best, float temperature) {
    int64_t low = INT32_MIN, high = INT32_MAX, above = 0;
    floats mass = all(0), at = all(0);
    ints more = {0};
    for (int last = 0; !last;) {
        last = low == high;
        int64_t middle = low + (high - low + 1) / 2;
        ints reached = {0};
        for (int64_t i = 0; i < n; i += LANES) {
            floats x = load_some(logits + i, n - i, -INFINITY);
            ints order = (ints)x ^ (((ints)x >> 31) & 0x7fffffff);
            reached -= order >= (int32_t)middle;
            if (!last) continue;
            floats e = exponential((x - best) / temperature);
            more -= order > (int32_t)low;
            mass += choose(order > (int32_t)low, e, all(0));
            at = choose(order == (int32_t)low, e, at);
        }
        int64_t count = 0;
        for (int i = 0; i < LANES; i++) count += reached[i];
        if (count >= k) low = middle;
        else high = middle - 1;
    }
    for (int i = 0; i < LANES; i++) above += more[i];
    return sum(mass) + (k - above) * most(at);
}

// The token that `generation.sampling.draw` takes of logits [n], or -1 where they have no finite best one. uniform [n], from 0
// to below 1, is overwritten; without it the best is taken. top_k = 0 and top_p = 1: all are kept.
int64_t gdn_draw(const float *logits, float *uniform, int64_t n, float temperature, int64_t top_k, float top_p) {
    int64_t token = first_of_largest(logits, n), ahead;
    if (token < 0 || !uniform) return token;
    float best = logits[token], total, mass;
    floats sums = all(0);
    for (int64_t i = 0; i < n; i += LANES) {
        floats score = (load_some(logits + i, n - i, -INFINITY) - best) / temperature;
        floats noise = -logarithm(1.0f - load_some(uniform + i, n - i, 0));
        sums += exponential(score);
        store_some(uniform + i, score - logarithm(choose(noise < 0x1p-25f, all(0x1p-25f), noise)), n - i);
    }
    total = top_k && top_p < 1.0f ? mass_of_best(logits, n, top_k, best, temperature) : sum(sums);
    for (;;) {
        token = first_of_largest(uniform, n);
        if (token < 0) return -1;
        betters(logits, uniform, n, logits[token], token, best, temperature, 0, &ahead, &mass);
        int dropped = (top_k && ahead >= top_k) || (top_p < 1.0f && mass >= top_p * total);
        if (!ahead || !dropped) return token;
        betters(logits, uniform, n, logits[token], token, best, temperature, 1, &ahead, &mass);
    }
}
