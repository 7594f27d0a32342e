/* NF4 on a CPU: four bits to float32, bfloat16 or float16, and back; bit for bit what nf4.py does.

A block has one magnitude and so only 16 different values: they are computed and rounded once a block, and all that is
left to do for a weight is to look one of them up. AVX2 and AVX-512 look up in registers; they are compiled wherever the
compiler knows the target attribute and chosen when the program runs. Everything else takes the plain C.

Rounding must be that of separate multiplications and additions: compile with -ffp-contract=off. Plain C ABI, called
through ctypes; nothing of Python or torch is needed to build it. */

#include "threads.h"

#include <string.h>
#include <sys/mman.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define X86 1
#else
#define X86 0
#endif

#define ALWAYS_INLINE static inline __attribute__((always_inline))
#define OUTER 256         /* magnitudes that share a second-level one, as in nf4.py */
#define SHARE (1L << 19)  /* values that are worth a thread */

enum dtype { FLOAT32, BFLOAT16, FLOAT16 };
enum vectors { PLAIN, AVX2, AVX512 };

typedef struct {
    uint8_t *codes;       /* two a byte, the first in the high half */
    void *absmax;         /* a block: float, or a number of `inner` where there is an `outer` */
    const float *inner;   /* 256 levels of the magnitudes */
    const float *outer;   /* a second-level magnitude for OUTER blocks; NULL without double quantization */
    const float *offset;
    const float *table;   /* 16 levels; to quantize, the 15 middles between them */
    void *dense;
    int64_t count, block;        /* dense values, and how many of them share a magnitude: a multiple of 32 */
    int64_t start, across, stride; /* dense block i is stored as block start + i / across * stride + i % across */
    int32_t dtype;
} Task;

typedef void Work(const Task *, int64_t first, int64_t last); /* on these dense blocks */

/* ---- Rounding, to nearest even ---- */

ALWAYS_INLINE uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

ALWAYS_INLINE float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

ALWAYS_INLINE uint16_t to_bfloat16(float x) {
    uint32_t bits = bits_of(x);
    return x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

ALWAYS_INLINE uint16_t to_float16(float x) {
    uint32_t bits = bits_of(x) & 0x7fffffff, sign = bits_of(x) >> 16 & 0x8000;
    if (bits > 0x7f800000) return sign | 0x7e00;
    if (bits >= 0x477ff000) return sign | 0x7c00; /* 65520, from where the nearest is infinity */
    if (bits < 0x38800000) /* below 2^-14, where steps are those of floats from one half: the addition rounds */
        return sign | (bits_of(float_of(bits) + 0.5f) - 0x3f000000);
    return sign | (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13;
}

ALWAYS_INLINE float from_float16(uint16_t half) {
    float small = float_of((uint32_t)(half & 0x7fff) << 13) * 0x1p112f;
    uint32_t bits = (half & 0x7c00) == 0x7c00 ? 0x7f800000 | (uint32_t)(half & 0x3ff) << 13 : bits_of(small);
    return float_of(bits | (uint32_t)(half & 0x8000) << 16);
}

/* ---- Four bits to dense ---- */

/* Where a dense block is stored, for loops that go from one to the next without a division. */
typedef struct {
    int64_t block, column;
} Place;

ALWAYS_INLINE Place place_of(const Task *task, int64_t block) {
    return (Place){task->start + block / task->across * task->stride + block % task->across, block % task->across};
}

ALWAYS_INLINE Place next_to(const Task *task, Place at) {
    if (++at.column == task->across) return (Place){at.block + 1 + task->stride - task->across, 0};
    at.block++;
    return at;
}

/* The codes of a stored block; those of a few rows below are sent for, since a tile may be narrow. */
ALWAYS_INLINE const uint8_t *codes_of(const Task *task, Place at) {
    __builtin_prefetch(task->codes + (at.block + 8 * task->stride) * task->block / 2);
    return task->codes + at.block * task->block / 2;
}

ALWAYS_INLINE float magnitude(const Task *task, Place at) {
    if (!task->outer) return ((const float *)task->absmax)[at.block];
    return task->inner[((const uint8_t *)task->absmax)[at.block]] * task->outer[at.block / OUTER] + *task->offset;
}

#define LOOK_UP(type, values)                                                            \
    do {                                                                                 \
        type *to = (type *)task->dense + start;                                          \
        for (int64_t i = 0; i < n / 2; i++) {                                            \
            to[2 * i] = values[codes[i] >> 4];                                           \
            to[2 * i + 1] = values[codes[i] & 15];                                       \
        }                                                                                \
        if (n % 2) to[n - 1] = values[codes[n / 2] >> 4];                                \
    } while (0)

static void dequantize_plain(const Task *task, int64_t first, int64_t last) {
    Place at = place_of(task, first);
    for (int64_t block = first; block < last; block++, at = next_to(task, at)) {
        int64_t start = block * task->block;
        int64_t n = task->count - start < task->block ? task->count - start : task->block;
        const uint8_t *codes = codes_of(task, at);
        float scale = magnitude(task, at), wide[16];
        uint16_t narrow[16];
        for (int k = 0; k < 16; k++) wide[k] = task->table[k] * scale;
        if (task->dtype == FLOAT32) {
            LOOK_UP(float, wide);
            continue;
        }
        for (int k = 0; k < 16; k++) narrow[k] = task->dtype == BFLOAT16 ? to_bfloat16(wide[k]) : to_float16(wide[k]);
        LOOK_UP(uint16_t, narrow);
    }
}

#if X86

/* Each function below takes whole blocks only. */

#define TARGET_AVX2 __attribute__((target("avx2,f16c")))

TARGET_AVX2 static inline __m256i bfloat16_avx2(__m256 x) { /* in 8 words of 32 bits */
    __m256i bits = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i near = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff)), 16);
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(near, _mm256_set1_epi32(0x7fc0), nan);
}

TARGET_AVX2 static void dequantize_avx2(const Task *task, int64_t first, int64_t last) {
    const __m256 low = _mm256_loadu_ps(task->table), high = _mm256_loadu_ps(task->table + 8);
    const __m128i even = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, -1, -1, -1, -1, -1, -1, -1, -1);
    const __m128i odd = _mm_setr_epi8(1, 3, 5, 7, 9, 11, 13, 15, -1, -1, -1, -1, -1, -1, -1, -1);
    Place at = place_of(task, first);
    for (int64_t block = first; block < last; block++, at = next_to(task, at)) {
        const uint8_t *codes = codes_of(task, at), *end = codes + task->block / 2;
        const __m256 scale = _mm256_set1_ps(magnitude(task, at));
        const __m256 wide0 = _mm256_mul_ps(low, scale), wide1 = _mm256_mul_ps(high, scale);
        if (task->dtype == FLOAT32) {
            float *to = (float *)task->dense + block * task->block;
            for (; codes < end; codes += 4, to += 8) {
                int32_t four;
                memcpy(&four, codes, 4);
                __m256i byte = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
                __m256i code = _mm256_or_si256(_mm256_srli_epi64(byte, 4), _mm256_slli_epi64(byte, 32));
                __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(code, 28)); /* its sign is bit 3 of the code */
                __m256 below = _mm256_permutevar8x32_ps(wide0, code), above = _mm256_permutevar8x32_ps(wide1, code);
                _mm256_storeu_ps(to, _mm256_blendv_ps(below, above, upper));
            }
            continue;
        }
        __m128i narrow0, narrow1;
        if (task->dtype == BFLOAT16) {
            __m256i both = _mm256_packus_epi32(bfloat16_avx2(wide0), bfloat16_avx2(wide1));
            both = _mm256_permute4x64_epi64(both, 0xd8);
            narrow0 = _mm256_castsi256_si128(both), narrow1 = _mm256_extracti128_si256(both, 1);
        } else {
            narrow0 = _mm256_cvtps_ph(wide0, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
            narrow1 = _mm256_cvtps_ph(wide1, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        }
        /* the low bytes of the 16 values and their high bytes, for two lookups by bytes */
        __m128i bytes0 = _mm_unpacklo_epi64(_mm_shuffle_epi8(narrow0, even), _mm_shuffle_epi8(narrow1, even));
        __m128i bytes1 = _mm_unpacklo_epi64(_mm_shuffle_epi8(narrow0, odd), _mm_shuffle_epi8(narrow1, odd));
        const __m256i lows = _mm256_broadcastsi128_si256(bytes0), highs = _mm256_broadcastsi128_si256(bytes1);
        uint16_t *to = (uint16_t *)task->dense + block * task->block;
        for (; codes < end; codes += 16, to += 32) {
            __m256i byte = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)codes));
            __m256i code = _mm256_or_si256(_mm256_srli_epi16(byte, 4), _mm256_slli_epi16(byte, 8));
            code = _mm256_and_si256(code, _mm256_set1_epi8(15));
            __m256i one = _mm256_shuffle_epi8(lows, code), two = _mm256_shuffle_epi8(highs, code);
            __m256i left = _mm256_unpacklo_epi8(one, two), right = _mm256_unpackhi_epi8(one, two);
            _mm256_storeu_si256((__m256i *)to, _mm256_permute2x128_si256(left, right, 0x20));
            _mm256_storeu_si256((__m256i *)(to + 16), _mm256_permute2x128_si256(left, right, 0x31));
        }
    }
}

#define TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))

TARGET_AVX512 static void dequantize_avx512(const Task *task, int64_t first, int64_t last) {
    const __m512 levels = _mm512_loadu_ps(task->table);
    Place at = place_of(task, first);
    for (int64_t block = first; block < last; block++, at = next_to(task, at)) {
        const uint8_t *codes = codes_of(task, at), *end = codes + task->block / 2;
        const __m512 wide = _mm512_mul_ps(levels, _mm512_set1_ps(magnitude(task, at)));
        if (task->dtype == FLOAT32) { /* a lookup reads the lowest four bits, so the byte need not be cut */
            float *to = (float *)task->dense + block * task->block;
            for (; codes < end; codes += 8, to += 16) {
                __m512i byte = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *)codes));
                __m512i code = _mm512_or_si512(_mm512_srli_epi64(byte, 4), _mm512_slli_epi64(byte, 32));
                _mm512_storeu_ps(to, _mm512_permutexvar_ps(code, wide));
            }
            continue;
        }
        __m256i narrow;
        if (task->dtype == BFLOAT16) {
            __m512i bits = _mm512_castps_si512(wide);
            __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
            __m512i near = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff)), 16);
            __mmask16 nan = _mm512_cmp_ps_mask(wide, wide, _CMP_UNORD_Q);
            narrow = _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(near, nan, _mm512_set1_epi32(0x7fc0)));
        } else
            narrow = _mm512_cvtps_ph(wide, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        const __m512i twice = _mm512_broadcast_i64x4(narrow); /* so that the fifth bit of a code means nothing */
        uint16_t *to = (uint16_t *)task->dense + block * task->block;
        for (; codes < end; codes += 16, to += 32) {
            __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)codes));
            __m512i code = _mm512_or_si512(_mm512_srli_epi32(byte, 4), _mm512_slli_epi32(byte, 16));
            _mm512_storeu_si512(to, _mm512_permutexvar_epi16(code, twice));
        }
    }
}

#endif

/* ---- Dense to four bits: one text, which the compiler vectorises for each target ---- */

ALWAYS_INLINE float read(const Task *task, int64_t i) {
    if (task->dtype == FLOAT32) return ((const float *)task->dense)[i];
    uint16_t narrow = ((const uint16_t *)task->dense)[i];
    return task->dtype == BFLOAT16 ? float_of((uint32_t)narrow << 16) : from_float16(narrow);
}

ALWAYS_INLINE void quantize_blocks(const Task *task, int64_t first, int64_t last) {
    float part[32];
    uint8_t code[32];
    const Task t = *task; /* a copy that no store below can alias */
    for (int64_t block = first; block < last; block++) {
        int64_t start = block * t.block, end = start + t.block < t.count ? start + t.block : t.count;
        uint32_t most = 0; /* magnitudes are ordered as their bits are */
        for (int64_t at = start; at < end; at += 32) {
            int64_t n = end - at < 32 ? end - at : 32;
            if (n == 32)
                for (int i = 0; i < 32; i++) {
                    uint32_t bits = bits_of(read(&t, at + i)) & 0x7fffffff;
                    most = bits > most ? bits : most;
                }
            else
                for (int i = 0; i < n; i++) {
                    uint32_t bits = bits_of(read(&t, at + i)) & 0x7fffffff;
                    most = bits > most ? bits : most;
                }
        }
        float absmax = float_of(most), inverse = most ? 1 / absmax : 0;
        ((float *)t.absmax)[block] = absmax;
        for (int64_t at = start; at < end; at += 32) {
            int64_t n = end - at < 32 ? end - at : 32;
            if (n == 32)
                for (int i = 0; i < 32; i++) part[i] = read(&t, at + i) * inverse;
            else /* what is missing is zero, whose number fills the last byte */
                for (int i = 0; i < 32; i++) part[i] = i < n ? read(&t, at + i) * inverse : 0;
            uint32_t found[32] = {0};
            for (int k = 0; k < 15; k++) {
                float middle = t.table[k];
                for (int i = 0; i < 32; i++) found[i] += !(middle >= part[i]); /* at a middle: the lower */
            }
            for (int i = 0; i < 32; i++) code[i] = found[i];
            for (int i = 0; i < (n + 1) / 2; i++) t.codes[at / 2 + i] = code[2 * i] << 4 | code[2 * i + 1];
        }
    }
}

static void quantize_plain(const Task *task, int64_t first, int64_t last) { quantize_blocks(task, first, last); }
#if X86
TARGET_AVX2 static void quantize_avx2(const Task *task, int64_t first, int64_t last) {
    quantize_blocks(task, first, last);
}
TARGET_AVX512 static void quantize_avx512(const Task *task, int64_t first, int64_t last) {
    quantize_blocks(task, first, last);
}
#endif

/* ---- Threads ---- */

typedef struct {
    const Task *task;
    Work *work;
    int64_t first, last;
} Part;

static void run_part(void *part) {
    const Part *p = part;
    p->work(p->task, p->first, p->last);
}

static void run(const Task *task, Work *work, int64_t blocks, int64_t threads) {
    Part parts[MOST];
    threads = worth(threads, blocks * task->block, SHARE);
    for (int64_t i = 0; i < threads; i++)
        parts[i] = (Part){task, work, blocks * i / threads, blocks * (i + 1) / threads};
    in_parts(run_part, parts, sizeof(Part), threads);
}

/* New memory comes in pages, and to get 8,192 small ones takes longer than to fill them. */
static void use_huge_pages(void *memory, int64_t size) {
#ifdef MADV_HUGEPAGE
    const uintptr_t page = 1 << 21, start = ((uintptr_t)memory + page - 1) & -page, end = (uintptr_t)memory + size;
    if (start + page < end) madvise((void *)start, (end - start) & -page, MADV_HUGEPAGE); /* advice: may be refused */
#else
    (void)memory, (void)size;
#endif
}

/* ---- What is called from Python ---- */

/* The widest vectors that this machine has: one of enum vectors. */
int32_t veneer_nf4_vectors(void) {
#if X86
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) return AVX2;
#endif
    return PLAIN;
}

void veneer_nf4_dequantize(const Task *task, int32_t vectors, int64_t threads) {
    use_huge_pages(task->dense, task->count * (task->dtype == FLOAT32 ? 4 : 2));
    int64_t blocks = (task->count + task->block - 1) / task->block, whole = blocks;
    Work *work = dequantize_plain;
#if X86
    if (vectors != PLAIN) {
        work = vectors == AVX2 ? dequantize_avx2 : dequantize_avx512;
        whole = task->count / task->block;
    }
#endif
    run(task, work, whole, threads);
    dequantize_plain(task, whole, blocks);
}

/* Writes codes and float magnitudes. */
void veneer_nf4_quantize(const Task *task, int32_t vectors, int64_t threads) {
    Work *work = quantize_plain;
#if X86
    if (vectors != PLAIN) work = vectors == AVX2 ? quantize_avx2 : quantize_avx512;
#endif
    run(task, work, (task->count + task->block - 1) / task->block, threads);
}
