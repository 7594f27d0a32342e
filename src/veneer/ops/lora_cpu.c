/* LoRA's small work on a CPU: dropout whose mask is computed from a seed, and the pair beside a layer for a few tokens.

The compiler makes vectors of these loops; each is compiled for AVX-512, AVX2 and plain x86-64 (elsewhere once), and the
widest that the machine has is taken when the program runs. Plain C ABI, called through ctypes. */

#include "threads.h"

#include <stdlib.h>
#include <string.h>

#define ALWAYS_INLINE static inline __attribute__((always_inline))
#define WORDS 64          /* random words at a time: two elements each */
#define SHARE (1L << 18)  /* elements that are worth a thread */
#define LANES 8           /* sums side by side in a product */

enum dtype { FLOAT32, BFLOAT16 };

/* ---- Dropout ---- */

typedef struct {
    const void *from;
    void *to;
    int64_t first, last;        /* elements; first is a multiple of 2 */
    uint32_t low, high;         /* the seed's halves */
    uint32_t threshold;         /* a lane below it is dropped */
    int32_t size;               /* bytes an element */
} Drop;

/* As `words` in dropout.py. */
ALWAYS_INLINE uint32_t word(uint32_t i, uint32_t low, uint32_t high) {
    uint32_t z = i * 0x9e3779b9u + low;
    z = (z ^ z >> 16) * 0x7feb352du + high;
    z = (z ^ z >> 15) * 0x31848babu;
    return z ^ z >> 16;
}

#define ZERO(type)                                                                  \
    do {                                                                            \
        const type *from = (const type *)task->from + at;                           \
        type *to = (type *)task->to + at;                                           \
        for (int64_t k = 0; k < many; k++) to[k] = lanes[k] >= least ? from[k] : 0; \
    } while (0)

ALWAYS_INLINE void drop(const Drop *task) {
    const uint16_t least = (uint16_t)task->threshold;
    for (int64_t at = task->first; at < task->last; at += 2 * WORDS) {
        uint16_t lanes[2 * WORDS];
        for (int k = 0; k < WORDS; k++) {
            uint32_t both = word((uint32_t)(at / 2) + k, task->low, task->high);
            lanes[2 * k] = (uint16_t)both, lanes[2 * k + 1] = (uint16_t)(both >> 16);
        }
        int64_t many = task->last - at < 2 * WORDS ? task->last - at : 2 * WORDS;
        if (task->size == 2) ZERO(uint16_t);
        else if (task->size == 4) ZERO(uint32_t);
        else ZERO(uint64_t);
    }
}

/* ---- The pair beside a layer ---- */

typedef struct {
    int64_t tokens, in, out, rank;
    float scale;
    int32_t dtype;
} Sizes;

typedef struct {
    const void *x, *y;          /* [tokens, in], [tokens, out] */
    const float *A, *B;         /* [rank, in], [out, rank] */
    void *to;
    const Sizes *sizes;
} Beside;

typedef float Lanes __attribute__((vector_size(4 * LANES)));

ALWAYS_INLINE float from_bfloat16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float x;
    memcpy(&x, &wide, 4);
    return x;
}

ALWAYS_INLINE uint16_t to_bfloat16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x != x) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t Order __attribute__((vector_size(4 * LANES)));
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (Order){__VA_ARGS__})
#endif

/* Sums of neighbours of two vectors, of neighbouring pairs, and of halves: one after the other they sum up eight. */
#define ONES(a, b) (SHUFFLE(a, b, 0, 8, 2, 10, 4, 12, 6, 14) + SHUFFLE(a, b, 1, 9, 3, 11, 5, 13, 7, 15))
#define TWOS(a, b) (SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13) + SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15))
#define FOURS(a, b) (SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15))

/* sums = M(v) for `LANES` rows of M, each `width` wide, read once and side by side. */
ALWAYS_INLINE void rows(const float *M, const float *v, int64_t width, float *sums) {
    Lanes s[LANES] = {{0}};
    int64_t k = 0;
    for (; k + LANES <= width; k += LANES) {
        Lanes by, row;
        memcpy(&by, v + k, sizeof by);
        for (int j = 0; j < LANES; j++) {
            memcpy(&row, M + j * width + k, sizeof row);
            s[j] += row * by;
        }
    }
    Lanes all = FOURS(TWOS(ONES(s[0], s[1]), ONES(s[2], s[3])), TWOS(ONES(s[4], s[5]), ONES(s[6], s[7])));
    memcpy(sums, &all, sizeof all);
    for (; k < width; k++)
        for (int j = 0; j < LANES; j++) sums[j] += M[j * width + k] * v[k];
}

/* to = M(v) for `count` rows of M. */
ALWAYS_INLINE void multiply(const float *M, const float *v, int64_t count, int64_t width, float *to) {
    int64_t r = 0;
    for (; r + LANES <= count; r += LANES) rows(M + r * width, v, width, to + r);
    for (; r < count; r++) {
        to[r] = 0;
        for (int64_t k = 0; k < width; k++) to[r] += M[r * width + k] * v[k];
    }
}

/* `room` is for rank, and for the wider of in and out. */
ALWAYS_INLINE void beside(const Beside *task, float *room) {
    const Sizes s = *task->sizes;
    float *h = room, *wide = room + s.rank;
    for (int64_t t = 0; t < s.tokens; t++) {
        const float *x = (const float *)task->x + t * s.in;
        if (s.dtype == BFLOAT16) {
            const uint16_t *narrow = (const uint16_t *)task->x + t * s.in;
            for (int64_t k = 0; k < s.in; k++) wide[k] = from_bfloat16(narrow[k]);
            x = wide;
        }
        multiply(task->A, x, s.rank, s.in, h);
        for (int64_t r = 0; r < s.rank; r++) h[r] *= s.scale;
        multiply(task->B, h, s.out, s.rank, wide);
        int64_t at = t * s.out;
        if (s.dtype == FLOAT32) {
            const float *restrict y = (const float *)task->y + at;
            float *restrict to = (float *)task->to + at;
            for (int64_t o = 0; o < s.out; o++) to[o] = y[o] + wide[o];
        } else {
            const uint16_t *restrict y = (const uint16_t *)task->y + at;
            uint16_t *restrict to = (uint16_t *)task->to + at;
            for (int64_t o = 0; o < s.out; o++) to[o] = to_bfloat16(from_bfloat16(y[o]) + wide[o]);
        }
    }
}

/* ---- The widest vectors that there are ---- */

#if defined(__x86_64__) && defined(__GNUC__)
#define FOR(name, target_name)                                                                        \
    __attribute__((target(target_name))) static void drop_##name(const Drop *task) { drop(task); }    \
    __attribute__((target(target_name))) static void beside_##name(const Beside *task, float *room) { beside(task, room); }
FOR(avx512, "avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
FOR(avx2, "avx2,fma")
#endif

static void drop_plain(const Drop *task) { drop(task); }
static void beside_plain(const Beside *task, float *room) { beside(task, room); }

static void (*drop_best)(const Drop *) = drop_plain;
static void (*beside_best)(const Beside *, float *) = beside_plain;

__attribute__((constructor)) static void choose(void) {
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        drop_best = drop_avx2, beside_best = beside_avx2;
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        drop_best = drop_avx512, beside_best = beside_avx512;
#endif
}

static void run_drop(void *task) { drop_best(task); }

/* Elements of `from`, those whose lane is below the threshold as zeros. */
void veneer_drop(const void *from, void *to, int64_t count, uint64_t seed, uint32_t threshold, int32_t size,
                 int64_t threads) {
    Drop tasks[MOST];
    threads = worth(threads, count, SHARE);
    int64_t share = (count / threads / 2 + 1) * 2;
    for (int64_t k = 0; k < threads; k++) {
        int64_t last = (k + 1) * share < count ? (k + 1) * share : count;
        tasks[k] = (Drop){from, to, k * share, last, (uint32_t)seed, (uint32_t)(seed >> 32), threshold, size};
    }
    in_parts(run_drop, tasks, sizeof(Drop), threads);
}

/* y + scale * B(A(x)) with A and B in float32, summed in float32; 0 where there is no memory for it. */
int veneer_beside(const void *x, const void *y, const float *A, const float *B, void *to, const Sizes *sizes) {
    Beside task = {x, y, A, B, to, sizes};
    float *room = malloc(sizeof(float) * (size_t)(sizes->rank + (sizes->in > sizes->out ? sizes->in : sizes->out)));
    if (!room) return 0;
    beside_best(&task, room);
    free(room);
    return 1;
}

/* ---- Rows under pairs of their own ---- */

typedef struct {
    const float *A, *B;
    int64_t rank;
    float scale;
} Pair;

typedef struct {
    int64_t row, pair;          /* -1: none */
} Turn;

typedef struct {
    const void *x, *y;          /* [rows, tokens, in], [rows, tokens, out] */
    void *to;
    const Pair *pairs;
    const Turn *turns;
    int64_t first, last;        /* turns; those of a row follow each other */
    Sizes sizes;                /* the largest rank */
    int32_t done;
} Mixed;

static void mix(void *given) {
    Mixed *task = given;
    Sizes sizes = task->sizes;
    const int64_t size = sizes.dtype == FLOAT32 ? 4 : 2;
    const int64_t from = size * sizes.tokens * sizes.in, step = size * sizes.tokens * sizes.out;
    float *room = malloc(sizeof(float) * (size_t)(sizes.rank + (sizes.in > sizes.out ? sizes.in : sizes.out)));
    task->done = room != NULL;
    for (int64_t k = task->first; room && k < task->last; k++) {
        const Turn turn = task->turns[k];
        const char *y = (const char *)task->y + turn.row * step;
        char *to = (char *)task->to + turn.row * step;
        if (turn.pair < 0) {
            memcpy(to, y, step);
            continue;
        }
        const Pair pair = task->pairs[turn.pair];
        if (k > task->first && task->turns[k - 1].row == turn.row) y = to;
        sizes.rank = pair.rank, sizes.scale = pair.scale;
        Beside one = {(const char *)task->x + turn.row * from, y, pair.A, pair.B, to, &sizes};
        beside_best(&one, room);
    }
    free(room);
}

/* As `veneer_beside`, for each turn its row of x and y by its pair, one pair after the other; 0 where there is no memory. */
int veneer_mixed(const void *x, const void *y, void *to, const Pair *pairs, const Turn *turns, int64_t count,
                 const Sizes *sizes, int64_t threads) {
    Mixed tasks[MOST];
    threads = worth(threads, count * sizes->tokens * (sizes->in + sizes->out), SHARE);
    int64_t first = 0, made = 0;
    for (int64_t k = 1; k <= threads; k++) {
        int64_t last = count * k / threads;
        while (last < count && last > 0 && turns[last].row == turns[last - 1].row) last++;
        if (last <= first) continue;
        tasks[made++] = (Mixed){x, y, to, pairs, turns, first, last, *sizes, 0};
        first = last;
    }
    in_parts(mix, tasks, sizeof(Mixed), made);
    int done = 1;
    for (int64_t k = 0; k < made; k++) done &= tasks[k].done;
    return done;
}
