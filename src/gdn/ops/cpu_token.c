// One more token of one row through a Gated DeltaNet on a CPU, by threads that wait for each other between its products.
//
// Reads each weight once, as it lies, at the memory's speed, which PyTorch's operators do not: float32, or bf16 that is widened
// on the way. All else is float32. The order of every sum hangs on sizes alone, so any number of threads gives the same bits.
// Widths (hidden, head sizes, FFN) are multiples of 32. `cpu_token.py` compiles this file and says what the fields hold.

#include <omp.h>

#include "cpu_vectors.h"

#define BLOCK 32  // rows of a weight, and columns, that stay with one thread

typedef struct {
    const float *mixer_norm, *conv, *conv_bias, *rate, *dt_bias, *o_norm, *ffn_norm;
    const void *projections, *out, *ffn, *down;
} Layer;

typedef struct {
    int64_t layers, hidden, heads, value_heads, head_dim, head_v_dim, ffn, vocab, conv_size;
    int64_t bf16, window_bf16, gate, negative, token, recurrent_stride, window_stride;
    const void *embeddings, *head;
    const float *norm;
    float *recurrent;
    void *window;
    float *room, *logits;
    const Layer *layer;
    float eps;
} Token;

// ---- products ----

// For bf16 weights a vector lies as its even and its odd columns, LANES of each in turn, so that a word of two weights is two
// products without a shuffle.
static inline void arrange(float *to, const float *from, int64_t n, int64_t bf16) {
    if (!bf16) {
        memcpy(to, from, 4 * n);
        return;
    }
    for (int64_t i = 0; i < n; i += 2 * LANES)
        for (int j = 0; j < LANES; j++) to[i + j] = from[i + 2 * j], to[i + LANES + j] = from[i + 2 * j + 1];
}

// Two sums and no more: with more of them an AMD's loads run ahead of what its own fetching follows, a quarter slower. Columns
// asked for ahead, to the second cache: how far was measured on an AMD and an Intel, which differ (docs/log.md).
#define AHEAD 512
static inline float dot(const void *weight, int64_t row, const float *x, int64_t n, int64_t bf16) {
    floats even = all(0), odd = all(0);
    if (bf16) {
        const uint16_t *w = (const uint16_t *)weight + row * n;
        for (int64_t i = 0; i < n; i += 2 * LANES) {
            words pair;
            __builtin_prefetch(w + i + AHEAD, 0, 2);
            memcpy(&pair, w + i, sizeof pair);
            even += (floats)(pair << 16) * load(x + i);
            odd += (floats)(pair & 0xffff0000u) * load(x + i + LANES);
        }
    } else {
        const float *w = (const float *)weight + row * n;
        for (int64_t i = 0; i < n; i += 2 * LANES) {
            for (int c = 0; c < 2 * LANES; c += 16) __builtin_prefetch(w + i + c + AHEAD, 0, 2);
            even += load(w + i) * load(x + i);
            odd += load(w + i + LANES) * load(x + i + LANES);
        }
    }
    return sum(even + odd);
}

static inline float product(const float *x, const float *y, int64_t n) {
    floats total = all(0);
    for (int64_t i = 0; i < n; i += LANES) total += load(x + i) * load(y + i);
    return sum(total);
}

static inline void normed(float *to, const float *x, const float *weight, float *room, const Token *t) {
    float scale = 1.0f / sqrtf(product(x, x, t->hidden) / t->hidden + t->eps);
    for (int64_t i = 0; i < t->hidden; i += LANES) store(room + i, load(x + i) * load(weight + i) * scale);
    arrange(to, room, t->hidden, t->bf16);
}

// ---- one layer's parts ----

// Of the channels [first, last) of y: the convolution over the window and the newest input, which the window takes up; SiLU.
static inline void convolve(float *y, const Layer *layer, void *window, int64_t first, int64_t last, int64_t channels,
                            const Token *t) {
    for (int64_t c = first; c < last; c += LANES) {
        floats x = load(y + c), mixed = x;
        if (t->conv_size) {
            mixed = x * load(layer->conv + (t->conv_size - 1) * channels + c);
            for (int64_t j = 0; j + 1 < t->conv_size; j++) {
                int64_t at = j * channels + c, next = at + channels, newest = j + 2 == t->conv_size;
                float *wide = (float *)window;
                uint16_t *narrow = (uint16_t *)window;
                mixed += load(layer->conv + at) * (t->window_bf16 ? load_bf16(narrow + at) : load(wide + at));
                if (t->window_bf16) store_bf16(narrow + at, newest ? x : load_bf16(narrow + next));
                else store(wide + at, newest ? x : load(wide + next));
            }
            if (layer->conv_bias) mixed += load(layer->conv_bias + c);
        }
        store(y + c, silu(mixed));
    }
}

// One head, from y to its part of o: S' = decay S; w = beta (v - k S'); S = S' + k w; o = q S' + (q k) w, then norm and gate.
static inline void mix(const float *y, float *o, const Layer *layer, float *S, int64_t head, float *room, const Token *t) {
    int64_t K = t->head_dim, V = t->head_v_dim, keys = t->heads * K, channels = 2 * keys + t->value_heads * V;
    int64_t of_keys = head / (t->value_heads / t->heads) * K;
    const float *q = y + of_keys, *k = q + keys, *v = y + 2 * keys + head * V;
    float dt = y[channels + head] + layer->dt_bias[head], beta = 1.0f / (1.0f + expf(-y[channels + t->value_heads + head]));
    float decay = expf(layer->rate[head] * (dt > 20.0f ? dt : log1pf(expf(dt))));
    if (t->negative) beta *= 2.0f;
    float q_scale = 1.0f / sqrtf(product(q, q, K) + 1e-6f), k_scale = 1.0f / sqrtf(product(k, k, K) + 1e-6f);
    float qk = product(q, k, K) * q_scale * k_scale;
    float *of_q = room, *of_k = room + V;  // what q and k read in S, of which o and w are made in place
    for (int64_t j = 0; j < V; j += BLOCK) {
        floats by_q[BLOCK / LANES] = {{0}}, by_k[BLOCK / LANES] = {{0}};
        for (int64_t i = 0; i < K; i++)
            for (int c = 0; c < BLOCK / LANES; c++) {
                floats part = load(S + i * V + j + c * LANES);
                by_q[c] += part * q[i];
                by_k[c] += part * k[i];
            }
        memcpy(of_q + j, by_q, sizeof by_q);
        memcpy(of_k + j, by_k, sizeof by_k);
    }
    floats squares = all(0);
    for (int64_t j = 0; j < V; j += LANES) {
        floats w = beta * (load(v + j) - load(of_k + j) * (decay * k_scale));
        floats read = load(of_q + j) * (decay * q_scale) + qk * w;
        squares += read * read;
        store(of_k + j, w * k_scale);
        store(of_q + j, read);
    }
    for (int64_t i = 0; i < K; i++)
        for (int64_t j = 0; j < V; j += LANES)
            store(S + i * V + j, load(S + i * V + j) * decay + load(of_k + j) * k[i]);
    // q's scale K^-1/2 is in the norm: s o / sqrt(s^2 |o|^2 / V + eps) = sqrt(V) o / sqrt(|o|^2 + V eps / s^2).
    float scale = sqrtf((float)V) / sqrtf(sum(squares) + V * t->eps * K);
    const float *gate = y + channels + 2 * t->value_heads + head * V;
    for (int64_t j = 0; j < V; j += LANES) {
        floats normed = load(of_q + j) * scale * load(layer->o_norm + j);
        store(of_q + j, t->gate ? normed * silu(load(gate + j)) : normed);
    }
    arrange(o + head * V, of_q, V, t->bf16);
}

// ---- threads ----

// The part of `rows` that belongs to a thread, whole blocks.
static inline int64_t start_of(int64_t rows, int index, int threads) {
    int64_t start = (rows + BLOCK - 1) / BLOCK * index / threads * BLOCK;
    return start < rows ? start : rows;
}

static inline __attribute__((always_inline)) void work(const Token *t, int me, int threads, const int64_t bf16) {
    int64_t D = t->hidden, F = t->ffn, values = t->value_heads * t->head_v_dim, keys = t->heads * t->head_dim;
    int64_t channels = 2 * keys + values, rows = channels + 2 * t->value_heads + (t->gate ? values : 0);
    int64_t widest = D > 2 * t->head_v_dim ? D : 2 * t->head_v_dim;
    float *x = t->room, *o = x + D, *inner = o + values, *up = inner + F, *y = up + F;
    float *room = y + (rows + BLOCK) + me * 2 * widest, *h = room + widest;
    int64_t first_head = t->value_heads * me / threads, last_head = t->value_heads * (me + 1) / threads;
    int64_t of_head = t->head_dim * t->head_v_dim, lines = (last_head - first_head) * of_head / 16;
#define PART(rows) int64_t first = start_of(rows, me, threads), last = start_of(rows, me + 1, threads)
    for (int64_t n = 0; n < t->layers; n++) {
        const Layer *layer = t->layer + n;
        float *S = t->recurrent + n * t->recurrent_stride + first_head * of_head;
        {
            PART(rows);
            normed(h, x, layer->mixer_norm, room, t);
            for (int64_t i = first; i < last; i++) {
                // The thread's states come to its cache beside the weights: `mix` would wait for them.
                int64_t line = (i - first) * lines / (last - first), end = (i + 1 - first) * lines / (last - first);
                for (; line < end; line++) __builtin_prefetch((char *)S + 64 * line, 0, 2);
                y[i] = dot(layer->projections, i, h, D, bf16);
            }
            void *window = (char *)t->window + n * t->window_stride;
            convolve(y, layer, window, first, last < channels ? last : channels, channels, t);
        }
#pragma omp barrier
        for (int64_t head = first_head; head < last_head; head++)
            mix(y, o, layer, S + (head - first_head) * of_head, head, room, t);
#pragma omp barrier
        {
            PART(D);
            for (int64_t i = first; i < last; i++) x[i] += dot(layer->out, i, o, values, bf16);
        }
#pragma omp barrier
        {
            PART(F);
            normed(h, x, layer->ffn_norm, room, t);
            for (int64_t i = first; i < last; i++) up[i] = dot(layer->ffn, i, h, D, bf16);
            for (int64_t i = first; i < last; i += LANES) store(up + i, silu(load(up + i)));
            for (int64_t i = first; i < last; i++) up[i] *= dot(layer->ffn, F + i, h, D, bf16);
            arrange(inner + first, up + first, last - first, bf16);
        }
#pragma omp barrier
        {
            PART(D);
            for (int64_t i = first; i < last; i++) x[i] += dot(layer->down, i, inner, F, bf16);
        }
#pragma omp barrier
    }
    PART(t->vocab);
    normed(h, x, t->norm, room, t);
    for (int64_t i = first; i < last; i++) t->logits[i] = dot(t->head, i, h, D, bf16);
#undef PART
}

// Logits after the token, by `threads` threads of OpenMP, PyTorch's own where it has the same library.
void gdn_step(const Token *t, int threads) {
    for (int64_t i = 0; i < t->hidden; i += LANES)
        store(t->room + i, t->bf16 ? load_bf16((const uint16_t *)t->embeddings + t->token * t->hidden + i)
                                   : load((const float *)t->embeddings + t->token * t->hidden + i));
#pragma omp parallel num_threads(threads)
    {
        if (t->bf16) work(t, omp_get_thread_num(), omp_get_num_threads(), 1);
        else work(t, omp_get_thread_num(), omp_get_num_threads(), 0);
    }
}
